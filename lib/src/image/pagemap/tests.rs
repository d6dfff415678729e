use super::*;

const NAME: &str = "pagemap-1.img";

fn page() -> PageSize {
    PageSize::new(4096).unwrap()
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// Magic numbers and a head with pages_id 2.
const HEAD: &str = "19435654 25400856 02000000 0802";

fn parse(entries: &str) -> Result<Pagemap, ImageError> {
    Pagemap::parse(&hex(&format!("{HEAD}{entries}")), NAME, page())
}

fn fault(runs: &[PageRun]) -> RunFault {
    match Pagemap::new(NAME, 1, page(), runs.to_vec()) {
        Err(ImageError::BadRun { what, entry, .. }) => {
            assert_eq!(entry, runs.len() - 1, "the last entry is at fault");
            what
        }
        other => panic!("expected a bad run, got {other:?}"),
    }
}

fn run(vaddr: u64, pages: u64, flags: u32) -> PageRun {
    PageRun {
        vaddr,
        pages,
        flags: PageFlags::from_bits(flags).unwrap(),
    }
}

#[test]
fn entries_of_criu_4_1_and_4_2_and_ours_mean_the_same() {
    let expected = [run(0x5630_2f3e_5000, 1, 4)];
    for entry in [
        // 4.1.1: count in field 2.
        "0c000000 0880a0f9f982c615 1001 2004",
        // 4.2: 0 in field 2, count in field 5.
        "0e000000 0880a0f9f982c615 1000 2004 2801",
        // Both.
        "0e000000 0880a0f9f982c615 1001 2004 2801",
    ] {
        let pagemap = parse(entry).unwrap();
        assert_eq!(
            (pagemap.pages_id(), pagemap.runs()),
            (2, &expected[..]),
            "{entry}"
        );
    }
}

#[test]
fn written_pagemaps_carry_both_counts() {
    let pagemap = Pagemap::new(NAME, 2, page(), vec![run(0x5630_2f3e_5000, 1, 4)]).unwrap();
    assert_eq!(
        pagemap.encode(),
        hex(&format!("{HEAD} 0e000000 0880a0f9f982c615 1001 2004 2801"))
    );
}

#[test]
fn a_v1_0_pagemap_has_only_the_type_magic() {
    let bytes = hex("25400856 02000000 0802 07000000 088020 1001 2004");
    let pagemap = Pagemap::parse(&bytes, NAME, page()).unwrap();
    assert_eq!(pagemap.runs(), [run(0x1000, 1, 4)]);
}

#[test]
fn entries_without_flags_are_present_or_in_the_parent() {
    for (entry, flags) in [
        ("05000000 088020 1001", 4),
        ("07000000 088020 1001 1800", 4),
        ("07000000 088020 1001 1801", 1),
        ("09000000 088020 1001 1801 2000", 1),
        ("07000000 088020 1001 2000", 0),
        ("07000000 088020 1001 2006", 6),
        ("07000000 088020 1001 2002", 2),
    ] {
        assert_eq!(
            parse(entry).unwrap().runs(),
            [run(0x1000, 1, flags)],
            "{entry}"
        );
    }
}

#[test]
fn compressed_and_unknown_entries_are_opaque() {
    for entry in [
        "09000000 088020 1001 2004 3200",
        "09000000 088020 1001 2004 3001",
        "09000000 088020 1001 2004 4001",
        "07000000 088020 1001 200c",
    ] {
        let error = parse(entry).unwrap_err();
        assert!(
            matches!(error, ImageError::Compressed { .. }),
            "{entry}: {error}"
        );
        assert!(error.is_opaque());
    }
    let error = parse("09000000 088020 1001 2004 4801").unwrap_err();
    assert!(
        matches!(error, ImageError::TooNew { .. }) && error.is_opaque(),
        "{error}"
    );
}

#[test]
fn unknown_flag_bits_are_refused() {
    let error = parse("07000000 088020 1001 2014").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("entry 0 (address 0x1000): unknown flags 0x14"),
        "{error}"
    );
    assert!(!error.is_opaque());
}

#[test]
fn missing_fields_are_named_with_their_offset() {
    for (entry, what) in [
        ("04000000 1001 2004", "no address"),
        ("05000000 088020 2004", "no page count"),
        ("02000000 0880", "not a pagemap entry"),
    ] {
        let error = parse(entry).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("byte 14"), "{error}");
    }
    let error = Pagemap::parse(&hex("1943565425400856"), NAME, page()).unwrap_err();
    assert!(matches!(error, ImageError::BadCount { .. }));
    let error = Pagemap::parse(&hex("1943565425400856 00000000"), NAME, page()).unwrap_err();
    assert!(error.to_string().contains("names no pages file"), "{error}");
}

#[test]
fn a_file_of_another_type_is_refused() {
    let error = Pagemap::parse(&hex("1943565430302750"), NAME, page()).unwrap_err();
    assert!(
        matches!(
            error,
            ImageError::WrongMagic {
                found: magic::PSTREE,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn runs_that_criu_cannot_have_written_are_refused() {
    let first = run(0x1000, 2, 4);
    assert_eq!(fault(&[run(0x1000, 1, 5)]), RunFault::PresentAndParent);
    assert_eq!(fault(&[run(0x1800, 1, 4)]), RunFault::Unaligned(4096));
    assert_eq!(fault(&[first, run(0x4000, 0, 4)]), RunFault::Empty);
    assert_eq!(
        fault(&[first, run(0x2000, 1, 4)]),
        RunFault::Descending(0x3000)
    );
    assert_eq!(
        fault(&[first, run(0x0000, 1, 4)]),
        RunFault::Descending(0x3000)
    );
    assert_eq!(
        fault(&[first, run(0x4000, u64::MAX, 4)]),
        RunFault::Overflow(u64::MAX)
    );
    assert_eq!(fault(&[run(u64::MAX - 4095, 1, 4)]), RunFault::Overflow(1));
    assert_eq!(
        fault(&[run(0, MAX_PAGES + 1, 4)]),
        RunFault::Absurd(MAX_PAGES + 1)
    );
    let half = run(MAX_PAGES * 4096, MAX_PAGES / 2 + 1, 1);
    let whole = run(0, MAX_PAGES / 2, 1);
    assert_eq!(fault(&[whole, half]), RunFault::Absurd(MAX_PAGES + 1));
}

#[test]
fn alignment_follows_the_page_size() {
    let pagemap = parse("07000000 088020 1001 2004").unwrap();
    let large = PageSize::new(65536).unwrap();
    assert!(matches!(
        pagemap.with_page_size(NAME, large),
        Err(ImageError::BadRun {
            what: RunFault::Unaligned(65536),
            ..
        })
    ));
}

#[test]
fn counts_are_by_kind() {
    let runs = vec![
        run(0, 1, 4),
        run(0x1000, 2, 1),
        run(0x3000, 4, 6),
        run(0x7000, 8, 2),
    ];
    let pagemap = Pagemap::new(NAME, 1, page(), runs).unwrap();
    assert_eq!((pagemap.pages(), pagemap.present_pages()), (15, 5));
    assert_eq!(pagemap.pages_where(PageFlags::is_lazy_only), 8);
    assert!(pagemap.needs_parent());
}

#[test]
fn runs_beyond_32_bits_are_split_when_written() {
    let pages = u64::from(u32::MAX) + 3;
    let pagemap = Pagemap::new(NAME, 1, page(), vec![run(0x1000, pages, 1)]).unwrap();
    let again = Pagemap::parse(&pagemap.encode(), NAME, page()).unwrap();
    assert_eq!(again.runs()[0].pages, u64::from(u32::MAX));
    assert_eq!(
        again.runs()[1],
        run(0x1000 + u64::from(u32::MAX) * 4096, 3, 1)
    );
}
