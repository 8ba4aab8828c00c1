//! [`Symbols`]: names of addresses.

/// A name and where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'s> {
    /// Address.
    pub address: u64,
    /// As nm(1) has it: `t` or `T` for code.
    pub kind: u8,
    /// Name.
    pub name: &'s str,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    /// 0: up to the next one.
    size: u32,
    /// Of the name in the text.
    start: u32,
    len: u16,
    kind: u8,
}

impl Entry {
    fn code(&self) -> bool {
        matches!(self.kind | 0x20, b't' | b'w' | b'i')
    }
}

/// Names with their addresses, ordered by address.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    text: String,
    entries: Vec<Entry>,
    /// Entries ordered by name.
    by_name: Vec<u32>,
}

/// A symbol without a size ends at the next one, or after so many bytes.
const LONGEST: u64 = 64 << 10;
/// How many functions may lie within another one.
const NESTED: usize = 16;

impl Symbols {
    /// Adds a name that goes on until the next one. [`Symbols::finish`] makes it visible.
    pub fn add(&mut self, address: u64, kind: u8, name: &str) {
        self.add_sized(address, 0, kind, name);
    }

    /// Adds a name of so many bytes.
    pub fn add_sized(&mut self, address: u64, size: u64, kind: u8, name: &str) {
        let (start, size) = (self.text.len(), u32::try_from(size).unwrap_or(u32::MAX));
        let (Ok(from), Ok(len)) = (u32::try_from(start), u16::try_from(name.len())) else { return };
        self.text.push_str(name);
        self.entries.push(Entry { address, size, start: from, len, kind });
    }

    /// Puts them in order.
    pub fn finish(&mut self) {
        self.entries.sort_by_key(|entry| entry.address);
        let mut by_name: Vec<u32> = (0..self.entries.len() as u32).collect();
        by_name.sort_by(|a, b| self.at(*a as usize).name.cmp(self.at(*b as usize).name));
        self.by_name = by_name;
    }

    fn at(&self, index: usize) -> Symbol<'_> {
        let Entry { address, start, len, kind, .. } = self.entries[index];
        Symbol { address, kind, name: &self.text[start as usize..start as usize + usize::from(len)] }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All of them, by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        (0..self.entries.len()).map(|index| self.at(index))
    }

    /// The address of a name; the first one if it is there more than once.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<u64> {
        let first = self.by_name.partition_point(|index| self.at(*index as usize).name < name);
        let same = self.by_name[first..].iter().map(|index| self.at(*index as usize));
        same.take_while(|symbol| symbol.name == name).map(|symbol| symbol.address).min()
    }

    /// The code that holds `address`: its name and how far behind its beginning. Of several names of one address
    /// the first one counts, as in the kernel's own traces.
    #[must_use]
    pub fn code(&self, address: u64) -> Option<(Symbol<'_>, u64)> {
        let behind = self.entries.partition_point(|entry| entry.address <= address);
        let mut before = self.entries[..behind].iter().rev().filter(|entry| entry.code());
        let holds = |entry: &&Entry| entry.size == 0 || address - entry.address < u64::from(entry.size);
        // Behind the end of one function there may be that of an outer one, but not far.
        let start = before.by_ref().take(NESTED).find(holds)?.address;
        let first = self.entries[..behind].partition_point(|entry| entry.address < start);
        let best =
            (first..behind).find(|index| self.entries[*index].code() && holds(&&self.entries[*index]))?;
        let next = self.entries[behind..].iter().find(|entry| entry.code()).map_or(u64::MAX, |e| e.address);
        let sized = self.entries[best].size != 0;
        let end = if sized { u64::MAX } else { next.min(start.saturating_add(LONGEST)) };
        (address < end).then(|| (self.at(best), address - start))
    }
}

#[cfg(test)]
mod tests {
    use super::Symbols;

    #[test]
    fn code_is_found_by_address_and_by_name() {
        let mut symbols = Symbols::default();
        for (address, kind, name) in [
            (0x2000, b'T', "b"),
            (0x1000, b't', "a"),
            (0x1800, b'd', "data"),
            (0x2000, b't', "alias"),
            (5, b'A', "a"),
        ] {
            symbols.add(address, kind, name);
        }
        symbols.finish();
        let code = |at| symbols.code(at).map(|(symbol, offset)| (symbol.name, offset));
        assert_eq!(code(0x1fff), Some(("a", 0xfff)));
        assert_eq!(code(0x2001), Some(("b", 1)));
        assert_eq!(code(0xfff), None);
        assert_eq!(code(0x2000 + (64 << 10)), None, "too far from any");
        assert_eq!(symbols.address("a"), Some(5));
        assert_eq!(symbols.address("data"), Some(0x1800));
        assert_eq!(symbols.address("c"), None);
        let mut sized = Symbols::default();
        sized.add_sized(0x1000, 0x100, b'T', "outer");
        sized.add_sized(0x1010, 0x10, b't', "inner");
        sized.add_sized(0x2000, 0x10, b't', "next");
        sized.finish();
        let code = |at| sized.code(at).map(|(symbol, offset)| (symbol.name, offset));
        assert_eq!(code(0x1015), Some(("inner", 5)));
        assert_eq!(code(0x1025), Some(("outer", 0x25)));
        assert_eq!(code(0x1100), None, "between two functions there is no name");
        assert_eq!(code(0x2010), None);
    }
}
