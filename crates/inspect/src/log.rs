//! The kernel's log, out of its ring buffer (Linux, kernel/printk/printk_ringbuffer.h): as it stands, also after a
//! panic.

use serde::Serialize;

use crate::View;

const MAX_RECORDS: u64 = 1 << 20;
const MAX_TEXT: u64 = 64 << 20;
const MAX_RECORD: usize = 16 << 10;
const STATE_SHIFT: u32 = 62;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// A record of the kernel's log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Its number.
    pub sequence: u64,
    /// Nanoseconds since boot.
    pub time_ns: u64,
    /// Severity, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Who wrote it: 0 is the kernel.
    pub facility: u8,
    /// The text.
    pub text: String,
}

impl View<'_> {
    /// The place of a field, by VMCOREINFO or by the types.
    fn log_offset(&self, structure: &str, field: &str) -> Option<u64> {
        let info = self.kernel.info.offset(&format!("{structure}.{field}"));
        info.or_else(|| self.kernel.types()?.offset(structure, field))
    }

    fn log_size(&self, structure: &str) -> Option<u64> {
        self.kernel.info.size(structure).or_else(|| self.kernel.types()?.size(structure))
    }

    /// The kernel's log, oldest first; `None` if it was not found.
    #[must_use]
    pub fn log(&self) -> Option<Vec<Record>> {
        let memory = &self.space;
        let symbol =
            |name: &str| self.kernel.symbols().address(name).or_else(|| self.kernel.info.symbol(name));
        let ring = symbol("prb").and_then(|at| memory.u64(at)).or_else(|| symbol("printk_rb_static"))?;
        let field = |structure: &str, field: &str, at: u64| {
            memory.u64(at.wrapping_add(self.log_offset(structure, field)?))
        };
        let descriptors = ring.wrapping_add(self.log_offset("printk_ringbuffer", "desc_ring")?);
        let texts = ring.wrapping_add(self.log_offset("printk_ringbuffer", "text_data_ring")?);
        let bits = |structure: &str, name: &str, at: u64| {
            let place = at.wrapping_add(self.log_offset(structure, name)?);
            memory.u32(place).filter(|bits| (4..=26).contains(bits))
        };
        let count = 1u64 << bits("prb_desc_ring", "count_bits", descriptors)?;
        let size = 1u64 << bits("prb_data_ring", "size_bits", texts)?;
        if size > MAX_TEXT || count > MAX_RECORDS {
            return None;
        }
        let table = field("prb_desc_ring", "descs", descriptors)?;
        let infos = field("prb_desc_ring", "infos", descriptors)?;
        let (head, tail) = (
            field("prb_desc_ring", "head_id", descriptors)?,
            field("prb_desc_ring", "tail_id", descriptors)?,
        );
        let ring = Ring {
            view: self,
            table,
            infos,
            count,
            size,
            data: field("prb_data_ring", "data", texts)?,
            each: self.log_size("prb_desc")?,
            info: self.log_size("printk_info")?,
            state: self.log_offset("prb_desc", "state_var")?,
            place: self.log_offset("prb_desc", "text_blk_lpos")?,
            begin: self.log_offset("prb_data_blk_lpos", "begin")?,
            next: self.log_offset("prb_data_blk_lpos", "next")?,
            sequence: self.log_offset("printk_info", "seq")?,
            time: self.log_offset("printk_info", "ts_nsec")?,
            len: self.log_offset("printk_info", "text_len")?,
        };
        let ids = (head.wrapping_sub(tail) & ((1 << STATE_SHIFT) - 1)).min(count);
        Some((0..=ids).filter_map(|n| ring.record(tail.wrapping_add(n) & ((1 << STATE_SHIFT) - 1))).collect())
    }
}

/// Where everything of the ring is.
struct Ring<'v, 'a> {
    view: &'v View<'a>,
    table: u64,
    infos: u64,
    count: u64,
    size: u64,
    data: u64,
    each: u64,
    info: u64,
    state: u64,
    place: u64,
    begin: u64,
    next: u64,
    sequence: u64,
    time: u64,
    len: u64,
}

impl Ring<'_, '_> {
    fn record(&self, id: u64) -> Option<Record> {
        let memory = &self.view.space;
        let index = id % self.count;
        let descriptor = self.table.wrapping_add(index.wrapping_mul(self.each));
        let state = memory.u64(descriptor.wrapping_add(self.state))?;
        if !matches!(state >> STATE_SHIFT, COMMITTED | FINALIZED) || state & ((1 << STATE_SHIFT) - 1) != id {
            return None;
        }
        let info = self.infos.wrapping_add(index.wrapping_mul(self.info));
        let len = usize::from(memory.u16(info.wrapping_add(self.len))?);
        // Facility and level follow the length.
        let (facility, bits) =
            (memory.u8(info.wrapping_add(self.len + 2))?, memory.u8(info.wrapping_add(self.len + 3))?);
        let place = descriptor.wrapping_add(self.place);
        let text = self.text(
            memory.u64(place.wrapping_add(self.begin))?,
            memory.u64(place.wrapping_add(self.next))?,
            len,
        )?;
        Some(Record {
            sequence: memory.u64(info.wrapping_add(self.sequence))?,
            time_ns: memory.u64(info.wrapping_add(self.time))?,
            level: bits >> 5,
            facility,
            text: String::from_utf8_lossy(&text).into_owned(),
        })
    }

    /// A block begins with its descriptor's number. One that would cross the end lies at the beginning.
    fn text(&self, begin: u64, next: u64, len: usize) -> Option<Vec<u8>> {
        if begin & 1 == 1 {
            // No text at all.
            return Some(Vec::new());
        }
        let (mut from, end) = (begin % self.size, next % self.size);
        if begin / self.size != next / self.size && end != 0 {
            from = 0;
        }
        let room = if end > from { end - from } else { self.size - from };
        let len = (len as u64).min(room.checked_sub(8)?);
        self.view.space.bytes(self.data.wrapping_add(from + 8), len, MAX_RECORD)
    }
}
