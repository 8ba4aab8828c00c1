//! The kernel's own symbol table, in every encoding from Linux 5.10 to 7.x (scripts/kallsyms.c).
//!
//! Names are strings of tokens; a token is a short text in a table of 256. Addresses are 32-bit offsets in one of
//! three forms, or whole. The tables are where VMCOREINFO says, or they are found in the kernel's data by the
//! tokens that stand for the ten digits. Which form it is, is not asked of a version: the address that comes
//! out for a symbol that is known (where SYSCALL or a page fault goes) decides.

use crate::{Space, Stretch, Symbols, VmCoreInfo};

/// Most symbols that a kernel may have.
const MAX_SYMBOLS: u32 = 2 << 20;
/// Fewest: less is an accident.
const MIN_SYMBOLS: u32 = 2000;
const MAX_NAMES: usize = 32 << 20;
const MAX_TOKENS: usize = 16 << 10;
/// How many names may be looked at in the search for where they begin.
const MAX_STEPS: usize = 64 << 20;
/// Longest name: KSYM_NAME_LEN.
const MAX_NAME: usize = 512;

/// Where the tables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tables {
    count: u32,
    names: u64,
    tokens: u64,
    index: u64,
    offsets: Option<u64>,
    base: Option<u64>,
    addresses: Option<u64>,
}

/// How an address is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// 64 bits.
    Whole,
    /// Negative: below the base; otherwise the value itself (per-CPU variables).
    AbsolutePercpu(u64),
    /// Behind the base.
    Relative(u64),
    /// Relative to the word's own place.
    OwnPlace,
}

/// Addresses that must come out for the names beside them.
pub(crate) type Known<'a> = &'a [(u64, &'a [&'a str])];

/// Reads the table by what VMCOREINFO says.
pub(crate) fn by_info(space: &Space<'_>, info: &VmCoreInfo, known: Known<'_>) -> Option<Symbols> {
    let count = space.u32(info.symbol("kallsyms_num_syms")?)?;
    let tables = Tables {
        count,
        names: info.symbol("kallsyms_names")?,
        tokens: info.symbol("kallsyms_token_table")?,
        index: info.symbol("kallsyms_token_index")?,
        offsets: info.symbol("kallsyms_offsets"),
        base: info.symbol("kallsyms_relative_base"),
        addresses: info.symbol("kallsyms_addresses"),
    };
    read(space, &tables, known)
}

/// Looks for the table in the kernel's image.
pub(crate) fn by_search(space: &Space<'_>, image: &[Stretch], known: Known<'_>) -> Option<Symbols> {
    image.iter().filter(|stretch| !stretch.executable).find_map(|stretch| {
        let len = stretch.end - stretch.start;
        let data = space.bytes(stretch.start, len, 256 << 20)?;
        token_tables(&data).into_iter().find_map(|(tokens, index)| {
            let near = Near { data: &data, start: stretch.start, tokens, index };
            near.tables().into_iter().find_map(|tables| read(space, &tables, known))
        })
    })
}

/// Places of the token table and its index.
fn token_tables(data: &[u8]) -> Vec<(usize, usize)> {
    const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = find(&data[from..], DIGITS).map(|at| at + from) {
        from = at + 1;
        if let Some(tables) = token_table(data, at) {
            found.push(tables);
        }
        if found.len() > 8 {
            break;
        }
    }
    found
}

fn find(data: &[u8], what: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = data.get(from..)?.iter().position(|byte| *byte == what[0]) {
        if data[from + at..].starts_with(what) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// The token table whose token `0` is at `digits`, and the index behind it, if both agree.
fn token_table(data: &[u8], digits: usize) -> Option<(usize, usize)> {
    // The table begins 48 tokens before.
    let mut start = digits;
    for _ in 0..b'0' {
        let text = data[..start.checked_sub(1)?].iter().rev().take(64).position(|byte| *byte == 0)?;
        start = start - 1 - text;
    }
    let mut offsets = Vec::with_capacity(256);
    let mut at = start;
    for _ in 0..256 {
        offsets.push((at - start) as u16);
        at += data.get(at..)?.iter().take(64).position(|byte| *byte == 0)? + 1;
    }
    (at - start <= MAX_TOKENS).then_some(())?;
    let wanted: Vec<u8> = offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
    let index =
        (at..at + 64).find(|place| data.get(*place..).is_some_and(|rest| rest.starts_with(&wanted)))?;
    // Padding before the first token looks like empty tokens; the index knows better, it has them all.
    Some((start, index))
}

/// The kernel's data around a token table.
struct Near<'a> {
    data: &'a [u8],
    start: u64,
    tokens: usize,
    index: usize,
}

impl Near<'_> {
    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.data.get(at..at + 4)?.try_into().ok()?))
    }

    fn u64(&self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(self.data.get(at..at + 8)?.try_into().ok()?))
    }

    /// Candidates for all tables: the number of symbols stands before the names, markers for each 256th name behind
    /// them, the addresses before the number (until 6.3) or behind the index of tokens.
    fn tables(&self) -> Vec<Tables> {
        let mut found = Vec::new();
        let lowest = self.tokens.saturating_sub(MAX_NAMES);
        let mut left = MAX_STEPS;
        let mut at = (self.tokens & !7).saturating_sub(8);
        while at >= lowest.max(8) && found.len() < 8 && left > 0 {
            if let Some(count) = self.names_at(at, &mut left) {
                let place = |offset: usize| self.start + offset as u64;
                let size = (count as usize * 4).next_multiple_of(8);
                let whole = count as usize * 8;
                let common = Tables {
                    count,
                    names: place(at + 8),
                    tokens: place(self.tokens),
                    index: place(self.index),
                    ..Tables::default()
                };
                let behind = (self.index + 512).next_multiple_of(8);
                // 6.4 and later, with and without a base; before that.
                found.push(Tables {
                    offsets: Some(place(behind)),
                    base: Some(place(behind + size)),
                    ..common
                });
                if let Some(before) = at.checked_sub(8 + size) {
                    found.push(Tables { offsets: Some(place(before)), base: Some(place(at - 8)), ..common });
                }
                if let Some(before) = at.checked_sub(whole) {
                    found.push(Tables { addresses: Some(place(before)), ..common });
                }
            }
            if at < 8 {
                break;
            }
            at -= 8;
        }
        found
    }

    /// The number of symbols, if it stands at `at` and so many names follow, and their markers.
    fn names_at(&self, at: usize, left: &mut usize) -> Option<u32> {
        let count = u32::try_from(self.u64(at)?).ok()?;
        if !(MIN_SYMBOLS..=MAX_SYMBOLS).contains(&count) {
            return None;
        }
        let names = at + 8;
        let (mut place, mut second) = (names, 0);
        for index in 0..count {
            if index == 256 {
                second = (place - names) as u32;
            }
            *left = left.checked_sub(1)?;
            let (len, head) = name_len(self.data.get(place..place + 2)?)?;
            place += head + len;
            if place > self.tokens {
                return None;
            }
        }
        let markers = place.next_multiple_of(4);
        (markers..=markers + 8)
            .step_by(4)
            .any(|m| self.u32(m) == Some(0) && self.u32(m + 4) == Some(second))
            .then_some(count)
    }
}

/// Length of a name in tokens, and of what says so. From 6.1 on a length may have two bytes.
fn name_len(head: &[u8]) -> Option<(usize, usize)> {
    let low = *head.first()?;
    match low {
        0 => None,
        1..=0x7f => Some((usize::from(low), 1)),
        _ => Some((usize::from(low & 0x7f) | usize::from(*head.get(1)?) << 7, 2)),
    }
}

fn read(space: &Space<'_>, tables: &Tables, known: Known<'_>) -> Option<Symbols> {
    if !(MIN_SYMBOLS..=MAX_SYMBOLS).contains(&tables.count) {
        return None;
    }
    let count = tables.count as usize;
    let tokens = tokens(space, tables)?;
    let names = names(space, tables, &tokens)?;
    let words = match (tables.offsets, tables.addresses) {
        (Some(offsets), _) => space.bytes(offsets, count as u64 * 4, count * 4)?,
        (None, Some(addresses)) => space.bytes(addresses, count as u64 * 8, count * 8)?,
        (None, None) => return None,
    };
    let base = tables.base.and_then(|base| space.u64(base));
    let forms = match (tables.offsets, base) {
        (None, _) => vec![Form::Whole],
        (_, Some(base)) => vec![Form::AbsolutePercpu(base), Form::Relative(base), Form::OwnPlace],
        (_, None) => vec![Form::OwnPlace],
    };
    let width = words.len() / count;
    let address = |form: Form, index: usize| -> u64 {
        let word = &words[index * width..(index + 1) * width];
        let short = || i64::from(i32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        match form {
            Form::Whole => word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
            Form::AbsolutePercpu(_) if short() >= 0 => short().cast_unsigned(),
            Form::AbsolutePercpu(base) => base.wrapping_sub(1).wrapping_add_signed(-short()),
            Form::Relative(base) => base.wrapping_add(short().cast_unsigned() & 0xffff_ffff),
            Form::OwnPlace => {
                let own = tables.offsets.unwrap_or(0).wrapping_add(index as u64 * 4);
                own.wrapping_add_signed(short())
            }
        }
    };
    // The form for which the known symbols are where they are known to be.
    let agrees = |form: &Form| {
        known.iter().any(|(at, wanted)| {
            names
                .iter()
                .enumerate()
                .any(|(index, (_, name))| address(*form, index) == *at && wanted.contains(&name.as_str()))
        })
    };
    let form = forms.into_iter().find(agrees)?;
    let mut symbols = Symbols::default();
    for (index, (kind, name)) in names.iter().enumerate() {
        symbols.add(address(form, index), *kind, name);
    }
    symbols.finish();
    Some(symbols)
}

fn tokens(space: &Space<'_>, tables: &Tables) -> Option<Vec<Vec<u8>>> {
    let index = space.bytes(tables.index, 512, 512)?;
    let mut tokens = Vec::with_capacity(256);
    for pair in index.as_chunks::<2>().0 {
        let at = u64::from(u16::from_le_bytes(*pair));
        let mut text = [0; 64];
        // The table may end right before the end of what is mapped.
        let place = tables.tokens.checked_add(at)?;
        let len = (1..=64).rev().step_by(9).find(|len| space.read(place, &mut text[..*len]).is_some())?;
        let end = text[..len].iter().position(|byte| *byte == 0)?;
        tokens.push(text[..end].to_vec());
    }
    Some(tokens)
}

/// Kind and name of each symbol.
fn names(space: &Space<'_>, tables: &Tables, tokens: &[Vec<u8>]) -> Option<Vec<(u8, String)>> {
    let mut names = Vec::with_capacity(tables.count as usize);
    let mut window = Window { space, at: tables.names, data: Vec::new(), next: 0 };
    for _ in 0..tables.count {
        let low = window.byte()?;
        let len = match low {
            0 => return None,
            1..=0x7f => usize::from(low),
            _ => usize::from(low & 0x7f) | usize::from(window.byte()?) << 7,
        };
        let mut name = Vec::new();
        for _ in 0..len {
            name.extend_from_slice(&tokens[usize::from(window.byte()?)]);
        }
        let (kind, name) = name.split_first()?;
        if name.is_empty() || name.len() > MAX_NAME || !kind.is_ascii_alphabetic() {
            return None;
        }
        names.push((*kind, String::from_utf8_lossy(name).into_owned()));
        if window.at - tables.names > MAX_NAMES as u64 {
            return None;
        }
    }
    Some(names)
}

/// Bytes in order, read page by page.
struct Window<'a, 'm> {
    space: &'a Space<'m>,
    at: u64,
    data: Vec<u8>,
    next: usize,
}

impl Window<'_, '_> {
    fn byte(&mut self) -> Option<u8> {
        if self.next == self.data.len() {
            let len = 4096 - (self.at & 0xfff);
            self.data = self.space.bytes(self.at, len, 4096)?;
            (self.at, self.next) = (self.at.checked_add(len)?, 0);
        }
        self.next += 1;
        Some(self.data[self.next - 1])
    }
}

#[cfg(test)]
mod tests;
