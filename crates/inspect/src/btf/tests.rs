//! Type information of a kernel with three structures.

use super::Types;

const STRUCT: u32 = 4;

/// A section of these types, whose strings are given with NULs between.
fn section(types: &[u32], strings: &str) -> Vec<u8> {
    let mut data = vec![0x9f, 0xeb, 1, 0];
    let size = types.len() as u32 * 4;
    for word in [24, 0, size, size, strings.len() as u32] {
        data.extend_from_slice(&u32::to_le_bytes(word));
    }
    types.iter().for_each(|word| data.extend_from_slice(&word.to_le_bytes()));
    data.extend_from_slice(strings.as_bytes());
    data
}

/// Strings: 1 "int", 5 "outer", 11 "a", 13 "inner", 19 "b", 21 "flag", 26 ".data..percpu", 40 "counter".
const STRINGS: &str = "\0int\0outer\0a\0inner\0b\0flag\0.data..percpu\0counter\0";

fn example() -> Vec<u8> {
    let head = |kind: u32, count: u32, bits: u32| kind << 24 | count | bits << 31;
    #[rustfmt::skip]
    let types = [
        1, head(1, 0, 0), 4, 32,                                      // 1: int
        0, head(2, 0, 0), 3,                                          // 2: pointer to 3
        5, head(STRUCT, 3, 0), 32, 11, 1, 0, 0, 4, 64, 13, 6, 192,    // 3: outer { a; {4}; inner }
        0, head(STRUCT, 1, 0), 16, 19, 5, 0,                          // 4: { b }
        0, head(3, 0, 0), 0, 2, 1, 2,                                 // 5: two pointers
        13, head(STRUCT, 1, 1), 4, 21, 1, 3 << 24 | 9,                // 6: inner { flag: 3 at bit 9 }
        40, head(14, 0, 0), 1, 0,                                     // 7: variable counter
        26, head(15, 1, 0), 64, 7, 0x28, 4,                           // 8: .data..percpu
    ];
    section(&types, STRINGS)
}

#[test]
fn fields_are_found_through_structures_with_and_without_names() {
    let types = Types::parse(example()).unwrap();
    assert_eq!(types.size("outer"), Some(32));
    assert_eq!(types.offset("outer", "a"), Some(0));
    let b = types.field("outer", "b").unwrap();
    assert_eq!((b.offset, b.size), (8, Some(16)), "of the anonymous structure");
    let flag = types.field("outer", "inner.flag").unwrap();
    assert_eq!((flag.offset, flag.bit, flag.bits), (25, 1, Some(3)));
    assert_eq!(types.offset("outer", "inner.flag"), None, "bits have no offset");
    assert_eq!(types.offset("outer", "inner"), Some(24));
    assert_eq!(types.offset_of("outer", &["c", "a"]), Some(0));
    assert_eq!(types.offset("none", "a"), None);
    assert_eq!(types.percpu("counter"), Some((0x28, 4)));
}

#[test]
fn what_is_cut_off_or_goes_round_does_no_harm() {
    let whole = example();
    for len in 0..whole.len() {
        if let Some(types) = Types::parse(whole[..len].to_vec()) {
            let _ = types.field("outer", "inner.flag");
        }
    }
    for at in 24..whole.len() {
        for value in [0, 1, 3, 4, 0x7f, 0x84, 0xff] {
            let mut broken = whole.clone();
            broken[at] = value;
            if let Some(types) = Types::parse(broken) {
                let _ = (
                    types.field("outer", "inner.flag"),
                    types.field("outer", "nothing"),
                    types.percpu("counter"),
                );
            }
        }
    }
}
