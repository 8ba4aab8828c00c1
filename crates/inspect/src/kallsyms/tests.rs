//! Tables as each generation of Linux lays them out.

use super::{by_info, by_search};
use crate::{Space, Stretch, VmCoreInfo};

const BASE: u64 = 0xffff_ffff_8000_0000;
const COUNT: usize = 3000;
const KNOWN: (u64, &[&str]) = (BASE + 0x10_0000 + 700 * 16, &["asm_exc_page_fault", "name700"]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Era {
    /// 5.10 to 6.3.
    OffsetsFirst,
    /// 6.4 to 6.14.
    OffsetsLast,
    /// 6.15 to 6.19.
    Relative,
    /// 7.0 and later.
    OwnPlace,
}

/// A kernel of nothing but its symbol table, mapped at `BASE` read-only by 2 MiB pages from physical 4 MiB on, and
/// where each table is.
fn kernel(era: Era) -> (Vec<u8>, Vec<(&'static str, u64)>) {
    let address = |n: usize| BASE + 0x10_0000 + n as u64 * 16;
    let mut data = vec![0x5a; 0x1008];
    let mut places = Vec::new();
    let base = BASE + 0x8_0000;
    let words = |data: &mut Vec<u8>, places: &mut Vec<(&'static str, u64)>| {
        data.resize(data.len().next_multiple_of(8), 0);
        let start = BASE + data.len() as u64;
        places.push(("kallsyms_offsets", start));
        for n in 0..COUNT {
            let word = match era {
                // The first is a per-CPU variable.
                _ if n == 0 && era != Era::OwnPlace && era != Era::Relative => 0x40,
                Era::OffsetsFirst | Era::OffsetsLast => (base - 1).wrapping_sub(address(n)) as u32,
                Era::Relative => (address(n) - base) as u32,
                Era::OwnPlace => address(n).wrapping_sub(start + n as u64 * 4) as u32,
            };
            data.extend_from_slice(&word.to_le_bytes());
        }
        if era != Era::OwnPlace {
            data.resize(data.len().next_multiple_of(8), 0);
            places.push(("kallsyms_relative_base", BASE + data.len() as u64));
            data.extend_from_slice(&base.to_le_bytes());
        }
    };
    if era == Era::OffsetsFirst {
        words(&mut data, &mut places);
    }
    data.resize(data.len().next_multiple_of(8), 0);
    places.push(("kallsyms_num_syms", BASE + data.len() as u64));
    data.extend_from_slice(&(COUNT as u64).to_le_bytes());
    // Token 1 is "name", 2 is "asm_exc_"; every other stands for its own character.
    places.push(("kallsyms_names", BASE + data.len() as u64));
    let names = data.len();
    let mut markers = Vec::new();
    for n in 0..COUNT {
        if n % 256 == 0 {
            markers.push((data.len() - names) as u32);
        }
        let mut name = vec![b'T', 1];
        name.extend_from_slice(n.to_string().as_bytes());
        if n == 11 {
            name.resize(300, b'x');
        }
        if name.len() > 0x7f {
            data.push(name.len() as u8 | 0x80);
            data.push((name.len() >> 7) as u8);
        } else {
            data.push(name.len() as u8);
        }
        data.extend_from_slice(&name);
    }
    data.resize(data.len().next_multiple_of(8), 0);
    markers.iter().for_each(|marker| data.extend_from_slice(&marker.to_le_bytes()));
    data.resize(data.len().next_multiple_of(8), 0);
    places.push(("kallsyms_token_table", BASE + data.len() as u64));
    let (table, mut index) = (data.len(), Vec::new());
    for token in 0..=255u8 {
        index.push((data.len() - table) as u16);
        match token {
            1 => data.extend_from_slice(b"name"),
            2 => data.extend_from_slice(b"asm_exc_"),
            0x21..0x7f => data.push(token),
            _ => {}
        }
        data.push(0);
    }
    data.resize(data.len().next_multiple_of(8), 0);
    places.push(("kallsyms_token_index", BASE + data.len() as u64));
    index.iter().for_each(|offset| data.extend_from_slice(&offset.to_le_bytes()));
    if era != Era::OffsetsFirst {
        words(&mut data, &mut places);
    }
    data.resize(2 << 20, 0);
    let mut memory = vec![0; 4 << 20];
    let mut set = |at: usize, value: u64| memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    set(0x1ff8, 0x2003);
    set(0x2000 + 510 * 8, 0x3003);
    set(0x3000, 0x40_0081 | 1 << 63);
    memory.extend_from_slice(&data);
    (memory, places)
}

fn check(symbols: &crate::Symbols, era: Era) {
    assert_eq!(symbols.len(), COUNT, "{era:?}");
    assert_eq!(symbols.address("name700"), Some(KNOWN.0), "{era:?}");
    assert_eq!(symbols.address("name2999"), Some(BASE + 0x10_0000 + 2999 * 16), "{era:?}");
    assert_eq!(symbols.code(KNOWN.0 + 3).map(|(symbol, offset)| (symbol.name, offset)), Some(("name700", 3)));
    assert!(symbols.iter().any(|symbol| symbol.name.len() == 302 && symbol.kind == b'T'), "a long name");
}

const ERAS: [Era; 4] = [Era::OffsetsFirst, Era::OffsetsLast, Era::Relative, Era::OwnPlace];

#[test]
fn tables_are_found_by_vmcoreinfo() {
    for era in ERAS {
        let (memory, places) = kernel(era);
        let mut text = "OSRELEASE=1\nA=1\nB=1\nC=1\nD=1\nE=1\nF=1\n".to_owned();
        for (name, at) in &places {
            text += &format!("SYMBOL({name})={at:x}\n");
        }
        let info = VmCoreInfo::parse(text.as_bytes()).unwrap();
        let space = Space::new(&memory, 0x1000, 4);
        check(&by_info(&space, &info, &[KNOWN]).unwrap_or_else(|| panic!("{era:?}")), era);
        assert!(by_info(&space, &info, &[(1, KNOWN.1)]).is_none(), "addresses that do not agree");
    }
}

#[test]
fn tables_are_found_without_help() {
    for era in ERAS {
        let (memory, _) = kernel(era);
        let space = Space::new(&memory, 0x1000, 4);
        let image = [Stretch { start: BASE, end: BASE + (2 << 20), writable: false, executable: false }];
        check(&by_search(&space, &image, &[KNOWN]).unwrap_or_else(|| panic!("{era:?}")), era);
    }
}

#[test]
fn broken_tables_are_no_tables() {
    let (memory, places) = kernel(Era::OffsetsLast);
    let at = |name: &str| {
        let place = places.iter().find(|place| place.0 == name).unwrap().1;
        (place - BASE) as usize + (4 << 20)
    };
    let image = [Stretch { start: BASE, end: BASE + (2 << 20), writable: false, executable: false }];
    let seen = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut broken = memory.clone();
        change(&mut broken);
        by_search(&Space::new(&broken, 0x1000, 4), &image, &[KNOWN]).is_some()
    };
    assert!(seen(&|_| {}));
    assert!(!seen(&|memory| memory[at("kallsyms_token_index") + 6] ^= 1));
    assert!(!seen(&|memory| memory[at("kallsyms_names")] = 0));
    assert!(!seen(&|memory| memory[at("kallsyms_num_syms")] ^= 0x10));
    assert!(!seen(&|memory| memory[at("kallsyms_relative_base") + 1] ^= 0x10));
}
