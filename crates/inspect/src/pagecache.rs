//! Files out of the guest's page cache: what of them is in memory.

use std::collections::HashSet;

use crate::View;
use crate::kernel::KERNEL_HALF;

/// Largest file that is read.
pub(crate) const MAX_FILE: u64 = 256 << 20;
const MAX_NODES: usize = 1 << 13;
const MAX_DEPTH: u32 = 6;
const PAGE: u64 = 4096;
/// XA_CHUNK_SHIFT.
const CHUNK: u32 = 6;

/// A file with holes where nothing is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sparse {
    data: Vec<u8>,
    present: Vec<bool>,
}

impl Sparse {
    fn new(size: u64) -> Sparse {
        Sparse { data: vec![0; size as usize], present: vec![false; size.div_ceil(PAGE) as usize] }
    }

    /// A file without holes.
    pub(crate) fn whole(data: Vec<u8>) -> Sparse {
        Sparse { present: vec![true; data.len().div_ceil(PAGE as usize)], data }
    }

    pub(crate) fn len(&self) -> u64 {
        self.data.len() as u64
    }

    /// Bytes that are all known.
    pub(crate) fn get(&self, at: u64, len: u64) -> Option<&[u8]> {
        let end = at.checked_add(len).filter(|end| *end <= self.len())?;
        let known = len == 0 || (at / PAGE..end.div_ceil(PAGE)).all(|page| self.present[page as usize]);
        known.then(|| &self.data[at as usize..end as usize])
    }

    /// Bytes of which some are known; each that is not is `hole`.
    pub(crate) fn get_with_holes(&self, at: u64, len: u64, hole: u8) -> Option<Vec<u8>> {
        let end = at.checked_add(len).filter(|end| *end <= self.len())?;
        let mut out = self.data[at as usize..end as usize].to_vec();
        for page in (at / PAGE..end.div_ceil(PAGE)).filter(|page| !self.present[*page as usize]) {
            let from = (page * PAGE).max(at) - at;
            let to = ((page + 1) * PAGE).min(end) - at;
            out[from as usize..to as usize].fill(hole);
        }
        Some(out)
    }

    fn page(&mut self, index: u64) -> Option<&mut [u8]> {
        let start = index.checked_mul(PAGE).filter(|at| *at < self.len())?;
        let end = (start + PAGE).min(self.len());
        Some(&mut self.data[start as usize..end as usize])
    }

    /// Whether anything is known, and whether all is.
    fn known(&self) -> (bool, bool) {
        (self.present.contains(&true), !self.present.contains(&false))
    }

    /// Fills the holes from the same file elsewhere; if what is known of both differs, it is another file.
    fn fill(&mut self, from: &[u8]) -> bool {
        if from.len() != self.data.len() {
            return false;
        }
        let known = self.present.iter().zip(self.data.chunks(PAGE as usize)).zip(from.chunks(PAGE as usize));
        if known.into_iter().any(|((present, a), b)| *present && a != b) {
            return false;
        }
        self.data.copy_from_slice(from);
        self.present.fill(true);
        true
    }
}

impl View<'_> {
    /// The size of a file that is open in the guest, if it is one that may be read.
    pub(crate) fn file_size(&self, file: u64) -> Option<u64> {
        let layout = &self.kernel.layout.memory;
        let inode = self.space.u64(file.checked_add(layout.file_inode?)?)?;
        self.space.u64(inode.checked_add(layout.inode_size?)?).filter(|size| (1..=MAX_FILE).contains(size))
    }

    /// What is known of the file: from the page cache, and where that has holes from elsewhere.
    pub(crate) fn file_content(&self, file: u64, path: &str) -> Option<Sparse> {
        let size = self.file_size(file)?;
        let mut content = Sparse::new(size);
        self.read_cache(file, &mut content);
        let (some, all) = content.known();
        if some
            && !all
            && let Some(data) = self.files.and_then(|files| files.read(path, size as usize))
        {
            content.fill(&data);
        }
        some.then_some(content)
    }

    fn read_cache(&self, file: u64, out: &mut Sparse) -> Option<()> {
        let layout = &self.kernel.layout.memory;
        let mapping = self.space.u64(file.checked_add(layout.file_mapping?)?)?;
        let pages = mapping.checked_add(layout.mapping_pages?)?.checked_add(layout.pages_head?)?;
        let cache = Cache {
            view: self,
            mapping,
            base: self.space.u64(self.kernel.symbols().address("vmemmap_base")?)?,
            size: self.kernel.layout.page_size.filter(|size| (32..=256).contains(size))?,
            page_mapping: layout.page_mapping?,
            page_index: layout.page_index?,
            shift: layout.node_shift?,
            slots: layout.node_slots?,
        };
        let head = self.space.u64(pages)?;
        let mut seen = HashSet::new();
        if is_node(head) {
            cache.node(head, 0, 0, &mut seen, out);
        } else {
            cache.fill(head, 0, 1, out);
        }
        Some(())
    }
}

struct Cache<'v, 'a> {
    view: &'v View<'a>,
    mapping: u64,
    base: u64,
    size: u64,
    page_mapping: u64,
    page_index: u64,
    shift: u64,
    slots: u64,
}

fn is_node(entry: u64) -> bool {
    entry & 3 == 2 && entry > 4096
}

impl Cache<'_, '_> {
    /// A node of the xarray (Linux, include/linux/xarray.h) whose first slot is for page `first`.
    fn node(&self, entry: u64, first: u64, depth: u32, seen: &mut HashSet<u64>, out: &mut Sparse) {
        let at = entry & !3;
        if at < KERNEL_HALF || depth > MAX_DEPTH || seen.len() > MAX_NODES || !seen.insert(at) {
            return;
        }
        let memory = &self.view.space;
        let Some(shift) = memory.u8(at.wrapping_add(self.shift)).map(u32::from).filter(|s| *s <= 36) else {
            return;
        };
        let Some(slots) = memory.bytes(at.wrapping_add(self.slots), 64 * 8, 64 * 8) else { return };
        let slots: Vec<u64> = slots.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        for (slot, value) in slots.iter().enumerate() {
            let Some(index) = (slot as u64).checked_shl(shift).and_then(|n| first.checked_add(n)) else {
                return;
            };
            if index.saturating_mul(PAGE) >= out.len() {
                return;
            }
            if is_node(*value) {
                if shift >= CHUNK {
                    self.node(*value, index, depth + 1, seen, out);
                }
                continue;
            }
            // Of a folio in several slots the others say which slot has it.
            let sibling = value & 3 == 2 && value >> 2 < 64;
            let head = if sibling { slots[(value >> 2) as usize] } else { *value };
            self.fill(head, index, 1 << shift, out);
        }
    }

    /// Copies `count` pages from page `index` on, which the folio at `page` has.
    fn fill(&self, page: u64, index: u64, count: u64, out: &mut Sparse) {
        if page < KERNEL_HALF || page & 3 != 0 {
            return;
        }
        let memory = &self.view.space;
        let word = |offset: u64| memory.u64(page.wrapping_add(offset));
        let (Some(mapping), Some(start)) = (word(self.page_mapping), word(self.page_index)) else { return };
        let behind = page.wrapping_sub(self.base);
        if mapping != self.mapping || start > index || !behind.is_multiple_of(self.size) {
            return;
        }
        let frame = behind / self.size;
        for number in index..index + count {
            let gpa = frame.checked_add(number - start).and_then(|frame| frame.checked_mul(PAGE));
            let (Some(gpa), Some(to)) = (gpa, out.page(number)) else { return };
            if self.view.space.memory().read(gpa, to) {
                out.present[number as usize] = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Sparse;

    #[test]
    fn holes_are_known_and_filled_by_the_same_file_only() {
        let mut file = Sparse::new(3 * 4096 - 5);
        file.page(1).unwrap().fill(7);
        file.present[1] = true;
        assert!(file.get(4096, 4096).is_some());
        assert!(file.get(4095, 2).is_none());
        assert!(file.get(2 * 4096, 4096).is_none(), "behind the end");
        assert_eq!(file.get_with_holes(4095, 2, 0x3f), Some(vec![0x3f, 7]));
        let mut other = vec![9; 3 * 4096 - 5];
        assert!(!file.fill(&other));
        other[4096..8192].fill(7);
        assert!(!file.fill(&other[1..]));
        assert!(file.fill(&other));
        assert_eq!(file.get(0, 1), Some(&[9][..]));
        assert_eq!(file.known(), (true, true));
    }
}
