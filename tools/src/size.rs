//! Sizes, rates and times, as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// A number of bytes; reads `4096`, `10G`, `1.5M`, `64KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

/// Bytes a second, never 0; reads like [`Bytes`], also with `/s` behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) u64);

/// A text that is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadSize(&'static str);

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for BadSize {}

const NO_SIZE: BadSize =
    BadSize("write a number of bytes, such as 4096, 500M or 10G (powers of 1024)");
const TOO_MANY: BadSize = BadSize("that is more bytes than there can be");

impl FromStr for Bytes {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let text = text.trim().trim_end_matches(['B', 'b']);
        let text = text.strip_suffix('i').unwrap_or(text);
        let unit = text.chars().last().and_then(|last| {
            UNITS
                .iter()
                .find(|(letter, _)| last.eq_ignore_ascii_case(letter))
        });
        let (number, shift) = match unit {
            Some((_, shift)) => (&text[..text.len() - 1], *shift),
            None => (text, 0),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 6 {
            return Err(NO_SIZE);
        }
        if shift == 0 && number.contains('.') {
            return Err(NO_SIZE);
        }
        let whole: u64 = whole.parse().map_err(|_| TOO_MANY)?;
        let millionths: u64 = format!("{fraction:0<6}").parse().map_err(|_| NO_SIZE)?;
        whole
            .checked_mul(1 << shift)
            .and_then(|bytes| bytes.checked_add((millionths << shift) / 1_000_000))
            .map(Self)
            .ok_or(TOO_MANY)
    }
}

impl FromStr for Rate {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        match text.trim().trim_end_matches("/s").parse()? {
            Bytes(0) => Err(BadSize("at 0 bytes a second nothing would ever arrive")),
            Bytes(rate) => Ok(Self(rate)),
        }
    }
}

/// `1.4 GiB`, `312 B`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().rev().find(|(_, shift)| self.0 >= 1 << shift);
        let Some((letter, shift)) = unit else {
            return f.pad(&format!("{} B", self.0));
        };
        let hundredths = (u128::from(self.0) * 100) >> shift;
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        f.pad(&match whole {
            0..10 => format!("{whole}.{rest:02} {letter}iB"),
            10..100 => format!("{whole}.{} {letter}iB", rest / 10),
            _ => format!("{whole} {letter}iB"),
        })
    }
}

/// `1 234 567`: digits in groups, for columns of counts.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `0.21 s`, `14.3 s`, `5 min 10 s`.
pub(crate) fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    match whole {
        0..10 => format!("{:.2} s", time.as_secs_f64()),
        10..120 => format!("{:.1} s", time.as_secs_f64()),
        120..7200 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// How long ago, in one unit: `40 s`, `3 h`, `12 d`.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// `bytes` in `time`, for humans and for JSON.
pub(crate) fn rate(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1024),
            ("64KiB", 65536),
            ("10g", 10 << 30),
            ("1.5M", 3 << 19),
            ("2TB", 2 << 40),
            (" 7b ", 7),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1.5",
            "1,5M",
            "10 G",
            "1X",
            "1e3",
            ".5M",
            "1.1234567M",
        ] {
            assert_eq!(text.parse::<Bytes>(), Err(NO_SIZE), "{text}");
        }
        assert_eq!("99999999T".parse::<Bytes>(), Err(TOO_MANY));
    }

    #[test]
    fn a_rate_is_never_zero() {
        assert_eq!("10M".parse(), Ok(Rate(10 << 20)));
        assert_eq!("1G/s".parse(), Ok(Rate(1 << 30)));
        assert!("0".parse::<Rate>().is_err());
    }

    #[test]
    fn three_digits_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (15 << 20, "15.0 MiB"),
            (1023 << 20, "1023 MiB"),
            (u64::MAX, "16777215 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(grouped(1_234_567), "1 234 567");
        assert_eq!(grouped(123), "123");
        assert_eq!(seconds(Duration::from_millis(215)), "0.21 s");
        assert_eq!(seconds(Duration::from_secs(310)), "5 min 10 s");
        assert_eq!(age(90_000), "25 h");
        assert_eq!(rate(1000, Duration::from_millis(500)), 2000);
    }
}
