use super::*;

fn ticket() -> Ticket {
    let addresses = vec![
        "10.1.2.3:4433".parse().unwrap(),
        "[2001:db8::7]:65535".parse().unwrap(),
    ];
    Ticket::new(
        addresses,
        Fingerprint([0x5a; 32]),
        Secret::from_bytes([0xc3; 32]),
    )
    .unwrap()
}

fn word_of(payload: &[u8]) -> String {
    text::encode(PREFIX, payload)
}

#[test]
fn a_ticket_comes_back_from_its_word() {
    let word = ticket().to_string();
    assert!(word.starts_with("crxfer1-"));
    assert!(word[8..].bytes().all(|byte| byte.is_ascii_alphanumeric()));
    assert_eq!(word.parse(), Ok(ticket()));
    assert_eq!(
        format!("\n {} \n", word.to_uppercase()).parse(),
        Ok(ticket())
    );
}

#[test]
fn the_most_addresses_fit() {
    let addresses = vec!["[2001:db8::7]:65535".parse().unwrap(); MAX_ADDRESSES];
    let full = Ticket::new(addresses.clone(), Fingerprint([1; 32]), Secret::generate()).unwrap();
    assert_eq!(full.to_string().parse(), Ok(full));
    let more = [addresses, vec!["1.2.3.4:5".parse().unwrap()]].concat();
    assert_eq!(
        Ticket::new(more, Fingerprint([1; 32]), Secret::generate()),
        Err(TicketError::TooManyAddresses(MAX_ADDRESSES + 1))
    );
}

#[test]
fn every_changed_character_is_found() {
    let word = ticket().to_string();
    for place in 0..word.len() {
        for other in "abcdefghijklmnopqrstuvwxyz0123456789-_ ".chars() {
            if word[place..].starts_with(other) {
                continue;
            }
            let mut changed = word.clone();
            changed.replace_range(place..=place, &other.to_string());
            assert!(changed.parse::<Ticket>().is_err(), "{place} {other}");
        }
    }
}

#[test]
fn every_missing_doubled_or_swapped_character_is_found() {
    let word = ticket().to_string();
    for place in 0..word.len() {
        let mut missing = word.clone();
        let taken = missing.remove(place);
        assert!(missing.parse::<Ticket>().is_err(), "without {place}");
        let mut doubled = word.clone();
        doubled.insert(place, taken);
        assert!(doubled.parse::<Ticket>().is_err(), "twice {place}");
        if place > 0 && !word[place - 1..].starts_with(taken) {
            let mut swapped = missing.clone();
            swapped.insert(place - 1, taken);
            assert!(swapped.parse::<Ticket>().is_err(), "swapped {place}");
        }
    }
}

#[test]
fn a_cut_ticket_says_so() {
    let word = ticket().to_string();
    for len in PREFIX.len()..word.len() {
        assert_eq!(
            word[..len].parse::<Ticket>(),
            Err(TicketError::Damaged),
            "{len}"
        );
    }
    assert_eq!(
        format!("{word}{word}").parse::<Ticket>(),
        Err(TicketError::Damaged)
    );
}

#[test]
fn other_words_are_told_apart() {
    for word in [
        "",
        "host:4433",
        "crxfer",
        "crxfer-",
        "crxferx-abc",
        "crxkey1-abc",
        "ü",
    ] {
        assert_eq!(
            word.parse::<Ticket>(),
            Err(TicketError::NotATicket),
            "{word}"
        );
    }
    assert_eq!(
        "crxfer2-abc".parse::<Ticket>(),
        Err(TicketError::OtherVersion)
    );
    assert_eq!(
        "crxfer12-abc".parse::<Ticket>(),
        Err(TicketError::OtherVersion)
    );
}

#[test]
fn content_that_breaks_the_format_is_refused_in_spite_of_its_checksum() {
    let good = ticket().payload();
    let change = |place: usize, value: u8| {
        let mut payload = good.clone();
        payload[place] = value;
        word_of(&payload).parse::<Ticket>()
    };
    assert!(matches!(change(0, 0), Err(TicketError::Malformed(_))));
    assert!(matches!(change(0, 1), Err(TicketError::Malformed(_))));
    assert!(matches!(change(0, 3), Err(TicketError::Malformed(_))));
    assert!(matches!(change(0, 255), Err(TicketError::Malformed(_))));
    assert!(matches!(change(1, 5), Err(TicketError::Malformed(_))));
    assert!(matches!(change(2, 224), Err(TicketError::Malformed(_))));
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(
        word_of(&longer).parse::<Ticket>(),
        Err(TicketError::Malformed(_))
    ));
    for len in 0..good.len() {
        assert!(word_of(&good[..len]).parse::<Ticket>().is_err());
    }
}

#[test]
fn a_secret_is_random_and_not_printed() {
    assert_ne!(Secret::generate(), Secret::generate());
    let shown = format!("{:?}", ticket());
    assert!(shown.contains("Secret(…)"), "{shown}");
    assert!(!shown.contains("195"), "{shown}");
}

#[test]
fn a_proof_is_good_for_one_secret_role_and_session() {
    let secret = Secret::from_bytes([1; 32]);
    let found = proof(&secret, Role::Source, &[2; 32]);
    assert!(verify_proof(&secret, Role::Source, &[2; 32], &found));
    assert!(!verify_proof(&secret, Role::Destination, &[2; 32], &found));
    assert!(!verify_proof(&secret, Role::Source, &[3; 32], &found));
    assert!(!verify_proof(
        &Secret::from_bytes([4; 32]),
        Role::Source,
        &[2; 32],
        &found
    ));
    assert!(!verify_proof(&secret, Role::Source, &[2; 32], &found[..31]));
    assert!(!verify_proof(&secret, Role::Source, &[2; 32], &[]));
}
