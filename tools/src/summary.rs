//! What `crxfer send` says when all is stored.

use crxfer::transfer::SendReport;
use serde_json::{Value, json};

use crate::error::Failed;
use crate::output;
use crate::size::{Bytes, grouped, rate, seconds};

/// The last line of `--json`.
pub(crate) fn json(report: &SendReport) -> Value {
    let (pages, published) = (&report.pages, &report.published);
    json!({
        "event": "done",
        "name": published.name,
        "generation": published.generation,
        "completeness": published.completeness,
        "layout": published.layout.as_str(),
        "base": published.base,
        "unchanged": published.unchanged,
        "ancestors": report.ancestors,
        "files": report.files,
        "pages": {
            "total": pages.total,
            "zero": pages.zero,
            "known": pages.known,
            "duplicate": pages.duplicate,
            "compressed": report.compressed_pages,
            "raw": raw_pages(report),
        },
        "bytes": {
            "image": report.image_bytes,
            "sent": report.wire_bytes.0,
            "received": report.wire_bytes.1,
        },
        "seconds": report.elapsed.as_secs_f64(),
        "bytes_per_second": rate(report.image_bytes, report.elapsed),
        "notes": published.notes,
    })
}

/// The same for people.
pub(crate) fn print(report: &SendReport) -> Result<(), Failed> {
    lines(report).iter().try_for_each(|text| output::line(text))
}

fn lines(report: &SendReport) -> Vec<String> {
    let published = &report.published;
    let mut lines = vec![headline(report)];
    let pages = &report.pages;
    let kinds = [
        ("zero", pages.zero),
        ("known", pages.known),
        ("duplicate", pages.duplicate),
        ("compressed", report.compressed_pages),
        ("raw", raw_pages(report)),
    ];
    lines.push(format!("  {:<12}{:>13}", "pages", grouped(pages.total)));
    for (kind, count) in kinds {
        lines.push(format!("    {kind:<10}{:>13}", grouped(count)));
    }
    let (sent, received) = report.wire_bytes;
    let on_wire = sent + received;
    lines.push(format!(
        "  {:<12}{:>13}",
        "image",
        Bytes(report.image_bytes).to_string()
    ));
    lines.push(format!(
        "  {:<12}{:>13}  ({} sent, {} received{})",
        "on the wire",
        Bytes(on_wire).to_string(),
        Bytes(sent),
        Bytes(received),
        saved(report.image_bytes, on_wire)
    ));
    lines.push(format!(
        "  {:<12}{:>13}  ({}/s)",
        "time",
        seconds(report.elapsed),
        Bytes(rate(report.image_bytes, report.elapsed))
    ));
    lines.extend(published.notes.iter().map(|note| format!("  note: {note}")));
    lines
}

fn headline(report: &SendReport) -> String {
    let published = &report.published;
    let base = published
        .base
        .as_ref()
        .map(|base| format!(" on {base}"))
        .unwrap_or_default();
    let ancestors = match report.ancestors {
        0 => String::new(),
        1 => ", with 1 ancestor".to_owned(),
        count => format!(", with {count} ancestors"),
    };
    let what = if published.unchanged {
        "unchanged"
    } else {
        "stored"
    };
    format!(
        "{what}: {} generation {}, {}{base}, {}{ancestors}",
        published.name,
        published.generation,
        published.layout.as_str(),
        published.completeness
    )
}

/// Empty where nothing was saved.
fn saved(image: u64, on_wire: u64) -> String {
    match image.checked_sub(on_wire) {
        Some(saved) if image > 0 => {
            let tenths = u128::from(saved) * 1000 / u128::from(image);
            format!(", {}.{} % saved", tenths / 10, tenths % 10)
        }
        _ => String::new(),
    }
}

fn raw_pages(report: &SendReport) -> u64 {
    report.pages.sent.saturating_sub(report.compressed_pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn savings_are_never_negative() {
        assert_eq!(saved(1000, 250), ", 75.0 % saved");
        assert_eq!(saved(1000, 1001), "");
        assert_eq!(saved(0, 0), "");
        assert_eq!(saved(1 << 40, 1), ", 99.9 % saved");
    }
}
