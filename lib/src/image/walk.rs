//! Whether an image that nothing here reads is at least whole: a walk over its frame.
//!
//! CRIU reads these files record by record and takes their end for the end of the list, so that one
//! that was cut between two records cannot be told from a shorter one. Everything else that a cut or
//! a flipped bit does to magic numbers, lengths and the encoding of a record is found here, and not
//! by a restore that fails half way.

use std::io::{BufReader, Read, Seek, SeekFrom};

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::error::ImageError;
use super::framing::{COMMON_MAGIC, FramingError, MAX_RECORD_BYTES, SERVICE_MAGIC};

/// What follows the magic numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    /// Records to the end.
    Records,
    /// Exactly one record.
    One,
    /// After each record as many bytes as the fields with these numbers say together.
    Data(&'static [u32]),
    /// One record, then bytes to the end.
    Head,
    /// Something that is not looked into.
    Any,
}

/// Names (`#` stands for a number, `%` for one in hexadecimal), type magics and bodies of the
/// images that CRIU writes.
const IMAGES: &[(&str, u32, Body)] = &[
    ("apparmor.img", 0x5942_3047, Body::Records),
    ("autofs-#.img", 0x4935_3943, Body::Records),
    ("binfmt-misc.img", 0x6734_3323, Body::Records),
    ("binfmt-misc-#.img", 0x6734_3323, Body::Records),
    ("bpfmap-data.img", 0x6432_4033, Body::Any),
    ("bpfmap-file.img", 0x5750_6142, Body::Records),
    ("cgroup.img", 0x5938_3330, Body::Records),
    ("core-#.img", 0x5505_3847, Body::One),
    ("cpuinfo.img", 0x6140_4013, Body::Records),
    ("creds-#.img", 0x5402_3547, Body::Records),
    ("eventfd.img", 0x4452_3722, Body::Records),
    ("eventpoll.img", 0x4502_3858, Body::Records),
    ("eventpoll-tfd.img", 0x4443_3746, Body::Records),
    ("ext-files.img", 0x5925_5641, Body::Records),
    ("fanotify.img", 0x5509_6122, Body::Records),
    ("fanotify-mark.img", 0x5650_6035, Body::Records),
    ("fdinfo-#.img", 0x5621_3732, Body::Records),
    ("fifo.img", 0x5836_4939, Body::Records),
    ("fifo-data.img", 0x5933_3054, Body::Data(&[2])),
    ("filelocks.img", 0x5432_3616, Body::Records),
    ("files.img", 0x5630_3138, Body::Records),
    ("fs-#.img", 0x5140_3912, Body::One),
    ("ghost-file-%.img", 0x5258_3605, Body::Head),
    ("ids-#.img", 0x5443_2030, Body::One),
    ("inetsk.img", 0x5644_3851, Body::Records),
    ("inotify.img", 0x4842_4431, Body::Records),
    ("inotify-wd.img", 0x5456_2009, Body::Records),
    ("inventory.img", 0x5831_3116, Body::One),
    ("ipcns-msg-#.img", 0x5545_3737, Body::Any),
    ("ipcns-sem-#.img", 0x5957_3019, Body::Any),
    ("ipcns-shm-#.img", 0x4628_3044, Body::Any),
    ("ipcns-var-#.img", 0x5311_5007, Body::Records),
    ("irmap-cache", 0x5700_4059, Body::Records),
    ("itimers-#.img", 0x5746_4056, Body::Records),
    ("memfd.img", 0x4845_3499, Body::Records),
    ("mm-#.img", 0x5749_2820, Body::One),
    ("mountpoints-#.img", 0x5556_3928, Body::Records),
    ("netdev-#.img", 0x5737_3951, Body::Records),
    ("netlinksk.img", 0x5800_5614, Body::Records),
    ("netns-#.img", 0x5593_3752, Body::Records),
    ("ns-files.img", 0x6139_4011, Body::Records),
    ("packetsk.img", 0x6045_4618, Body::Records),
    ("pidfd.img", 0x5443_5556, Body::Records),
    ("pidns-#.img", 0x6115_7326, Body::Records),
    ("pipes.img", 0x5651_3555, Body::Records),
    ("pipes-data.img", 0x5645_3709, Body::Data(&[2])),
    ("posix-timers-#.img", 0x5260_3957, Body::Records),
    ("pstree.img", 0x5027_3030, Body::Records),
    ("reg-files.img", 0x5036_3636, Body::Records),
    ("remap-fpath.img", 0x5913_3954, Body::Records),
    ("rlimit-#.img", 0x5711_3925, Body::Records),
    ("seccomp.img", 0x6441_3049, Body::Records),
    ("sigacts-#.img", 0x5534_4201, Body::Records),
    ("signal-p-#.img", 0x5925_5647, Body::Records),
    ("signal-s-#.img", 0x5925_5647, Body::Records),
    ("signalfd.img", 0x5732_3820, Body::Records),
    ("sk-queues.img", 0x5626_4026, Body::Data(&[2])),
    ("stats-dump", 0x5709_3306, Body::One),
    ("stats-restore", 0x5709_3306, Body::One),
    ("tcp-stream-%.img", 0x5146_5506, Body::Data(&[1, 3])),
    ("timens-#.img", 0x4311_4433, Body::Records),
    ("timerfd.img", 0x5049_3712, Body::Records),
    ("tty.img", 0x5943_3025, Body::Records),
    ("tty-data.img", 0x5941_3026, Body::Records),
    ("tty-info.img", 0x5945_3036, Body::Records),
    ("tunfile.img", 0x5714_3751, Body::Records),
    ("unixsk.img", 0x5437_3943, Body::Records),
    ("userns-#.img", 0x5547_4906, Body::Records),
    ("utsns-#.img", 0x5447_3203, Body::Records),
    ("vmas-#.img", 0x5412_3737, Body::Records),
];

/// Whether [`check_image`] knows what a file of that name has to be.
pub fn is_known(name: &str) -> bool {
    find(name).is_some()
}

/// Checks the frame of the image called `name`. Files of other names pass.
pub fn check_image(name: &str, file: impl Read + Seek) -> Result<(), ImageError> {
    let Some((magic, body)) = find(name) else {
        return Ok(());
    };
    let mut file = BufReader::new(file);
    let io = |action| {
        move |source| ImageError::Io {
            path: name.into(),
            action,
            source,
        }
    };
    let end = file.seek(SeekFrom::End(0)).map_err(io("seek in"))?;
    file.rewind().map_err(io("seek in"))?;
    let mut walk = Walk {
        name,
        file,
        at: 0,
        end,
    };
    walk.magic(magic)?;
    walk.body(body)
}

fn find(name: &str) -> Option<(u32, Body)> {
    IMAGES
        .iter()
        .find(|(pattern, ..)| fits(pattern, name))
        .map(|&(_, magic, body)| (magic, body))
}

fn fits(pattern: &str, name: &str) -> bool {
    let Some(place) = pattern.find(['#', '%']) else {
        return pattern == name;
    };
    let radix = if pattern.as_bytes()[place] == b'#' {
        10
    } else {
        16
    };
    name.strip_prefix(&pattern[..place])
        .and_then(|rest| rest.strip_suffix(&pattern[place + 1..]))
        .is_some_and(|number| {
            !number.is_empty() && number.chars().all(|digit| digit.is_digit(radix))
        })
}

struct Walk<'a, R> {
    name: &'a str,
    file: BufReader<R>,
    at: u64,
    end: u64,
}

impl<R: Read + Seek> Walk<'_, R> {
    fn magic(&mut self, expected: u32) -> Result<(), ImageError> {
        let length = usize::try_from(self.end).unwrap_or(usize::MAX);
        let short = FramingError::NoMagic { length };
        let mut found = self.word()?.ok_or_else(|| self.framing(short))?;
        if matches!(found, COMMON_MAGIC | SERVICE_MAGIC) {
            found = self.word()?.ok_or_else(|| self.framing(short))?;
        }
        if found != expected {
            return Err(ImageError::WrongMagic {
                file: self.name.to_owned(),
                expected,
                found,
            });
        }
        Ok(())
    }

    fn body(&mut self, body: Body) -> Result<(), ImageError> {
        let mut count = 0u64;
        while self.at < self.end && body != Body::Any {
            let offset = usize::try_from(self.at).unwrap_or(usize::MAX);
            let message = self.record(offset)?;
            let data = match body {
                Body::Data(fields) => self.sum(&message, fields, offset)?,
                _ => self.sum(&message, &[], offset)?,
            };
            self.skip(data, offset)?;
            count += 1;
            if body == Body::Head {
                break;
            }
        }
        let what = match (body, count) {
            (Body::One | Body::Head, 0) => "holds no record where one is due",
            (Body::One, 2..) => "holds several records where one is due",
            _ => return Ok(()),
        };
        Err(ImageError::BadCount {
            file: self.name.to_owned(),
            what,
        })
    }

    fn record(&mut self, offset: usize) -> Result<Vec<u8>, ImageError> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let Some(stated) = self.word()? else {
            return Err(self.framing(FramingError::StrayBytes {
                offset,
                extra: left,
            }));
        };
        let stated = usize::try_from(stated).unwrap_or(usize::MAX);
        if stated > MAX_RECORD_BYTES {
            return Err(self.framing(FramingError::TooLong { offset, stated }));
        }
        let available = left - 4;
        if stated > available {
            return Err(self.framing(FramingError::CutShort {
                offset,
                stated,
                available,
            }));
        }
        let mut message = vec![0; stated];
        self.read(&mut message)?;
        Ok(message)
    }

    // Walks a message's fields; the values of those in `fields` together.
    fn sum(&self, message: &[u8], fields: &[u32], offset: usize) -> Result<u64, ImageError> {
        let bad = |what: String| ImageError::BadRecord {
            file: self.name.to_owned(),
            offset,
            what,
        };
        let mut rest = message;
        let mut sum = 0u64;
        while !rest.is_empty() {
            let (field, kind) = decode_key(&mut rest).map_err(|error| bad(error.to_string()))?;
            if fields.contains(&field) && kind == WireType::Varint {
                let value = decode_varint(&mut rest).map_err(|error| bad(error.to_string()))?;
                sum = sum.saturating_add(value);
            } else {
                skip_field(kind, field, &mut rest, DecodeContext::default())
                    .map_err(|error| bad(error.to_string()))?;
            }
        }
        Ok(sum)
    }

    fn skip(&mut self, bytes: u64, offset: usize) -> Result<(), ImageError> {
        let left = self.end - self.at;
        if bytes > left {
            return Err(ImageError::BadRecord {
                file: self.name.to_owned(),
                offset,
                what: format!("{bytes} bytes of data belong to it, but only {left} follow"),
            });
        }
        self.at += bytes;
        let step = i64::try_from(bytes).expect("within a file");
        let moved = self.file.seek_relative(step);
        moved.map_err(|source| self.io("seek in", source))
    }

    // `None` if the file ends before it.
    fn word(&mut self) -> Result<Option<u32>, ImageError> {
        if self.end - self.at < 4 {
            return Ok(None);
        }
        let mut word = [0; 4];
        self.read(&mut word)?;
        Ok(Some(u32::from_le_bytes(word)))
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), ImageError> {
        let read = self.file.read_exact(buffer);
        read.map_err(|source| self.io("read", source))?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn framing(&self, error: FramingError) -> ImageError {
        ImageError::Framing {
            file: self.name.to_owned(),
            error,
        }
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> ImageError {
        ImageError::Io {
            path: self.name.into(),
            action,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn check(name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        check_image(name, Cursor::new(bytes))
    }

    fn image(magic: u32, tail: &[u8]) -> Vec<u8> {
        [&COMMON_MAGIC.to_le_bytes(), &magic.to_le_bytes(), tail].concat()
    }

    #[test]
    fn every_cut_inside_a_record_is_found() {
        let whole = image(
            0x5630_3138,
            &[2, 0, 0, 0, 8, 1, 0, 0, 0, 0, 2, 0, 0, 0, 8, 2],
        );
        for len in 0..whole.len() {
            let is_between_records = [8, 14, 18].contains(&len);
            let checked = check("files.img", &whole[..len]);
            assert_eq!(checked.is_ok(), is_between_records, "{len}: {checked:?}");
        }
        check("files.img", &whole).unwrap();
    }

    #[test]
    fn data_behind_records_is_counted() {
        let pipe = [4, 0, 0, 0, 8, 7, 16, 3, b'a', b'b', b'c'];
        check(
            "pipes-data.img",
            &image(0x5645_3709, &[pipe, pipe].concat()),
        )
        .unwrap();
        let error = check("pipes-data.img", &image(0x5645_3709, &pipe[..10])).unwrap_err();
        assert!(error.to_string().contains("only 2 follow"), "{error}");
        let stream = [4, 0, 0, 0, 8, 2, 24, 1, b'i', b'i', b'o'];
        check("tcp-stream-1f.img", &image(0x5146_5506, &stream)).unwrap();
        assert!(check("tcp-stream-1f.img", &image(0x5146_5506, &stream[..9])).is_err());
        let ghost = [2, 0, 0, 0, 8, 0, 1, 2, 3];
        check("ghost-file-a.img", &image(0x5258_3605, &ghost)).unwrap();
    }

    #[test]
    fn messages_that_are_none_and_wrong_counts_are_found() {
        let error = check("files.img", &image(0x5630_3138, &[2, 0, 0, 0, 8, 0x80])).unwrap_err();
        assert!(
            matches!(error, ImageError::BadRecord { offset: 8, .. }),
            "{error}"
        );
        for tail in [&[][..], &[0, 0, 0, 0, 0, 0, 0, 0]] {
            let error = check("core-1.img", &image(0x5505_3847, tail)).unwrap_err();
            assert!(matches!(error, ImageError::BadCount { .. }), "{error}");
        }
        let error = check("core-1.img", &image(0x5505_3848, &[0; 4])).unwrap_err();
        assert!(matches!(error, ImageError::WrongMagic { .. }), "{error}");
    }

    #[test]
    fn only_names_that_criu_gives_are_known() {
        for name in [
            "core-17.img",
            "tcp-stream-a0.img",
            "stats-dump",
            "inventory.img",
        ] {
            assert!(is_known(name), "{name}");
        }
        for name in [
            "core-.img",
            "core-a.img",
            "core-1.img.bak",
            "pages-1.img",
            "tmpfs-3.tar.gz.img",
        ] {
            assert!(!is_known(name), "{name}");
        }
        check("notes.txt", b"anything").unwrap();
    }
}
