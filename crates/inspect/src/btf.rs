//! BTF: the kernel's description of its own types (Linux, Documentation/bpf/btf.rst).
//!
//! Only what a reader of memory asks for is kept: structures by name, their fields, and the variables of data
//! sections.

use std::collections::HashMap;
use std::ops::Range;

const MAGIC: u16 = 0xeb9f;
const MAX_TYPES: usize = 1 << 20;
/// How deep anonymous structures and typedefs may nest.
const MAX_DEPTH: usize = 16;
/// How many fields may be looked at for one that is asked for.
const MAX_MEMBERS: usize = 1 << 16;
/// Size of a pointer.
const POINTER: u64 = 8;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// A field of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes behind the structure's beginning.
    pub offset: u64,
    /// Bits behind that byte; for bit fields only.
    pub bit: u32,
    /// Bits, for bit fields.
    pub bits: Option<u32>,
    /// Bytes, if known.
    pub size: Option<u64>,
    kind: u32,
}

/// A kernel's types.
#[derive(Clone, Debug)]
pub struct Types {
    data: Vec<u8>,
    strings: Range<usize>,
    /// Where each type's description begins.
    at: Vec<u32>,
    structs: HashMap<String, u32>,
    /// Offsets and sizes of the variables of `.data..percpu`.
    percpu: HashMap<String, (u64, u64)>,
}

impl Types {
    /// Takes a `.BTF` section apart; `None` if it is none.
    #[must_use]
    pub fn parse(data: Vec<u8>) -> Option<Types> {
        let word = |at: usize| Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?) as usize);
        if word(0)? & 0xffff != usize::from(MAGIC) || data.get(2) != Some(&1) {
            return None;
        }
        let head = word(4)?;
        let section = |offset: usize, len: usize| -> Option<Range<usize>> {
            let start = head.checked_add(offset)?;
            let end = start.checked_add(len)?;
            (end <= data.len()).then_some(start..end)
        };
        let types = section(word(8)?, word(12)?)?;
        let strings = section(word(16)?, word(20)?)?;
        let mut all =
            Types { at: vec![0], strings, structs: HashMap::new(), percpu: HashMap::new(), data: Vec::new() };
        all.data = data;
        let mut place = types.start;
        while place + 12 <= types.end && all.at.len() < MAX_TYPES {
            let (kind, count) = all.head(place);
            let more = match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * count,
                ENUM | FUNC_PROTO => 8 * count,
                // Pointers, modifiers, forward declarations, functions, floats; what is not known cannot be skipped.
                PTR | 7..=12 | 16 | 18 => 0,
                _ => break,
            };
            if place + 12 + more > types.end {
                break;
            }
            let id = all.at.len() as u32;
            all.at.push(place as u32);
            if kind == STRUCT && count > 0 {
                let name = all.name(all.word(place)).to_owned();
                if !name.is_empty() {
                    all.structs.entry(name).or_insert(id);
                }
            }
            place += 12 + more;
        }
        all.read_percpu();
        (all.at.len() > 1).then_some(all)
    }

    fn word(&self, at: usize) -> u32 {
        self.data.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    /// Kind and number of parts.
    fn head(&self, at: usize) -> (u32, usize) {
        let info = self.word(at + 4);
        (info >> 24 & 31, (info & 0xffff) as usize)
    }

    fn name(&self, offset: u32) -> &str {
        let all = &self.data[self.strings.clone()];
        let rest = all.get(offset as usize..).unwrap_or_default();
        let end = rest.iter().take(512).position(|byte| *byte == 0).unwrap_or(0);
        std::str::from_utf8(&rest[..end]).unwrap_or_default()
    }

    fn place(&self, id: u32) -> Option<usize> {
        self.at.get(id as usize).filter(|_| id > 0).map(|at| *at as usize)
    }

    fn read_percpu(&mut self) {
        let mut found = HashMap::new();
        for at in self.at[1..].iter().map(|at| *at as usize) {
            let (DATASEC, count) = self.head(at) else { continue };
            if self.name(self.word(at)) != ".data..percpu" {
                continue;
            }
            for part in 0..count {
                let entry = at + 12 + 12 * part;
                let Some(variable) = self.place(self.word(entry)) else { continue };
                let name = self.name(self.word(variable)).to_owned();
                found.insert(name, (u64::from(self.word(entry + 4)), u64::from(self.word(entry + 8))));
            }
        }
        self.percpu = found;
    }

    /// Bytes of a structure.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u64> {
        Some(u64::from(self.word(self.place(*self.structs.get(name)?)? + 8)))
    }

    /// A field of a structure; `path` may go through structures, `a.b`. Fields of anonymous structures are fields of
    /// what holds them.
    #[must_use]
    pub fn field(&self, name: &str, path: &str) -> Option<Field> {
        let mut kind = *self.structs.get(name)?;
        let mut whole = Field { offset: 0, bit: 0, bits: None, size: None, kind };
        for part in path.split('.') {
            let field = self.member(kind, part, 0, &mut { MAX_MEMBERS })?;
            whole = Field { offset: whole.offset + field.offset, ..field };
            kind = field.kind;
        }
        whole.size = self.size_of(whole.kind, 0);
        Some(whole)
    }

    /// Offset of a field in bytes; `None` for bit fields.
    #[must_use]
    pub fn offset(&self, name: &str, path: &str) -> Option<u64> {
        self.field(name, path)
            .filter(|field| field.bits.is_none() && field.bit == 0)
            .map(|field| field.offset)
    }

    /// The first of these paths that there is.
    #[must_use]
    pub fn offset_of(&self, name: &str, paths: &[&str]) -> Option<u64> {
        paths.iter().find_map(|path| self.offset(name, path))
    }

    /// Offset and size of a per-CPU variable within its section.
    #[must_use]
    pub fn percpu(&self, name: &str) -> Option<(u64, u64)> {
        self.percpu.get(name).copied()
    }

    /// Behind typedefs and qualifiers.
    fn plain(&self, mut id: u32) -> Option<usize> {
        for _ in 0..MAX_DEPTH {
            let at = self.place(id)?;
            match self.head(at).0 {
                TYPEDEF..=11 | 18 => id = self.word(at + 8),
                _ => return Some(at),
            }
        }
        None
    }

    fn member(&self, id: u32, name: &str, depth: usize, left: &mut usize) -> Option<Field> {
        let at = self.plain(id)?;
        let (kind, count) = self.head(at);
        if depth > MAX_DEPTH || !matches!(kind, STRUCT | UNION) {
            return None;
        }
        let has_bits = self.word(at + 4) >> 31 == 1;
        let read = |part: usize| {
            let entry = at + 12 + 12 * part;
            let (kind, offset) = (self.word(entry + 4), self.word(entry + 8));
            let (bit, bits) = if has_bits { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
            let field = Field {
                offset: u64::from(bit / 8),
                bit: bit % 8,
                bits: (bits != 0).then_some(bits),
                size: None,
                kind,
            };
            (self.word(entry), field)
        };
        // Structures that hold themselves many times over come to an end.
        *left = left.checked_sub(count)?;
        for part in 0..count {
            let (named, field) = read(part);
            if self.name(named) == name && !name.is_empty() {
                return Some(field);
            }
        }
        for part in 0..count {
            let (named, field) = read(part);
            if self.name(named).is_empty()
                && let Some(inner) = self.member(field.kind, name, depth + 1, left)
            {
                return Some(Field { offset: field.offset + inner.offset, ..inner });
            }
        }
        None
    }

    fn size_of(&self, id: u32, depth: usize) -> Option<u64> {
        let at = self.plain(id)?;
        match self.head(at).0 {
            INT | STRUCT | UNION | ENUM | ENUM64 | 16 => Some(u64::from(self.word(at + 8))),
            PTR => Some(POINTER),
            ARRAY if depth < MAX_DEPTH => {
                let each = self.size_of(self.word(at + 12), depth + 1)?;
                each.checked_mul(u64::from(self.word(at + 20)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
