use serde::{Deserialize, Serialize};

use crate::{Container, Header, Record, StateError, Value, Writer};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Chip {
    count: u64,
    level: Option<bool>,
    #[serde(with = "crate::hex")]
    bytes: [u8; 3],
}

impl Record for Chip {
    const KIND: &'static str = "chip";
    const VERSION: u16 = 2;

    fn upgrade(version: u16, mut old: Value) -> Option<Value> {
        if version != 1 {
            return None;
        }
        // Version 1 had no bytes.
        old.as_object_mut()?.insert("bytes".to_owned(), "000000".into());
        Some(old)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct OldChip {
    count: u64,
    level: Option<bool>,
}

impl Record for OldChip {
    const KIND: &'static str = "chip";
    const VERSION: u16 = 1;
}

#[derive(Debug, Serialize, Deserialize)]
struct Newer {
    count: u64,
    level: Option<bool>,
    bytes: String,
    colour: u8,
}

impl Record for Newer {
    const KIND: &'static str = "chip";
    const VERSION: u16 = 2;
}

#[derive(Debug, Serialize, Deserialize)]
struct Note(u32);

impl Record for Note {
    const KIND: &'static str = "note";
    const VERSION: u16 = 7;
}

fn chip() -> Chip {
    Chip { count: u64::MAX, level: Some(true), bytes: [0, 0xab, 0xff] }
}

fn header() -> Header {
    Header { producer: "wardian 0.1.0".into(), page_size: 4096, vcpus: 2, ..Header::default() }
}

fn sample() -> Vec<u8> {
    let mut writer = Writer::new(&header()).unwrap();
    writer.add("", &chip()).unwrap();
    writer.add("1", &Chip { count: 3, ..chip() }).unwrap();
    writer.add_optional("", &Note(5)).unwrap();
    writer.finish()
}

#[test]
fn what_was_written_is_read() {
    let bytes = sample();
    assert_eq!(bytes.len() % 8, 0);
    assert_eq!(Container::peek(&bytes).unwrap(), header());
    let mut read = Container::parse(&bytes).unwrap();
    assert_eq!(read.header(), &header());
    assert_eq!(read.take::<Chip>("").unwrap(), chip());
    assert_eq!(read.take::<Chip>("1").unwrap().count, 3);
    assert_eq!(read.take::<Chip>("2").unwrap_err().to_string(), "The saved machine has no chip 2");
    // The note is optional.
    read.finish().unwrap();
}

#[test]
fn the_header_is_read_by_eye_and_by_later_versions() {
    let mut later = header();
    later.more.insert("colour".to_owned(), "green".into());
    let bytes = Writer::new(&later).unwrap().finish();
    assert!(bytes.starts_with(b"wardian\n"));
    assert!(String::from_utf8_lossy(&bytes).contains("\"producer\":\"wardian 0.1.0\""));
    assert_eq!(Container::parse(&bytes).unwrap().header().more["colour"], "green");
}

#[test]
fn left_over_records_are_named() {
    let mut read = Container::parse(&sample()).unwrap();
    read.take::<Chip>("").unwrap();
    let error = read.finish().unwrap_err();
    assert!(matches!(&error, StateError::LeftOver(names) if names == &["chip 1"]), "{error}");
}

#[test]
fn older_versions_are_upgraded_and_newer_ones_refused() {
    let mut writer = Writer::new(&header()).unwrap();
    writer.add("", &OldChip { count: 8, level: None }).unwrap();
    let mut read = Container::parse(&writer.finish()).unwrap();
    assert_eq!(read.take::<Chip>("").unwrap(), Chip { count: 8, level: None, bytes: [0; 3] });

    let mut read = Container::parse(&sample()).unwrap();
    let error = read.take::<OldChip>("").unwrap_err();
    assert!(matches!(error, StateError::Version { found: 2, known: 1, .. }), "{error}");
}

#[test]
fn a_field_that_reading_would_lose_refuses_the_record() {
    let mut writer = Writer::new(&header()).unwrap();
    writer.add("", &Newer { count: 8, level: None, bytes: "010203".into(), colour: 1 }).unwrap();
    let mut read = Container::parse(&writer.finish()).unwrap();
    let error = read.take::<Chip>("").unwrap_err();
    assert!(matches!(error, StateError::Fields { .. }), "{error}");
}

#[test]
fn names_are_unique_and_plain() {
    let mut writer = Writer::new(&header()).unwrap();
    writer.add("a", &chip()).unwrap();
    assert!(matches!(writer.add("a", &chip()), Err(StateError::Name(_))));
    assert!(matches!(writer.add("a b", &chip()), Err(StateError::Name(_))));
    assert!(matches!(writer.add(&"x".repeat(65), &chip()), Err(StateError::Name(_))));
}

#[test]
fn every_flipped_bit_and_every_truncation_is_an_error() {
    let good = sample();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Container::parse(&bad).is_err(), "bit {bit}");
    }
    for len in 0..good.len() {
        assert!(Container::parse(&good[..len]).is_err(), "{len} bytes");
    }
    let mut long = good;
    long.extend_from_slice(&[0; 8]);
    assert!(Container::parse(&long).is_err());
}

/// Sets a checksum right, so that what stands behind it is reached.
fn mend(bytes: &mut [u8], start: usize, len: usize, at: usize) {
    let crc = {
        let part = &mut bytes[start..start + len];
        part[at..at + 4].fill(0);
        crc32fast::hash(part)
    };
    bytes[start + at..start + at + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn hostile_bytes_behind_a_right_checksum_are_errors_or_harmless() {
    let good = sample();
    let header_len = u32::from_le_bytes(good[8..12].try_into().unwrap()) as usize;
    // xorshift64, seeded: the same mutations every time.
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..1 + next() % 4 {
            let at = next() as usize % bad.len();
            let odd = [0, 0xff, 0x80, b'"', b'{', b'[', b'9', next() as u8];
            bad[at] = odd[next() as usize % odd.len()];
        }
        mend(&mut bad, 0, header_len, 16);
        // The first record, wherever its mutated length says that it ends.
        let field = |at: usize| u16::from_le_bytes([bad[header_len + at], bad[header_len + at + 1]]) as usize;
        let payload = u64::from_le_bytes(bad[header_len + 16..header_len + 24].try_into().unwrap());
        let len = payload.saturating_add((24 + field(8) + field(10)) as u64);
        if let Some(len) = len.checked_next_multiple_of(8)
            && len <= (bad.len() - header_len) as u64
        {
            mend(&mut bad, header_len, len as usize, 12);
        }
        let _ = Container::peek(&bad);
        if let Ok(mut read) = Container::parse(&bad) {
            let _ = (read.take::<Chip>(""), read.take::<Chip>("1"), read.take::<Note>(""));
            let _ = read.finish();
        }
    }
}

#[test]
fn later_formats_are_refused_with_their_producer() {
    let mut bytes = sample();
    bytes[12] = 9;
    let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
    mend(&mut bytes, 0, len, 16);
    let error = Container::parse(&bytes).unwrap_err().to_string();
    assert!(error.contains("format 9") && error.contains("wardian 0.1.0"), "{error}");
    assert!(matches!(Container::parse(b"MZ"), Err(StateError::Magic)));
}
