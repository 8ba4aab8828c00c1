//! The stack as transfers see it: reading frames without committing, and placing whole frames at once.

use wardian_cpu::Segment;

use super::canonical;
use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

/// Width mask of the current stack pointer (Intel SDM vol. 1, 6.2.3).
#[inline]
pub(crate) fn mask(core: &Core) -> u64 {
    if core.is_64bit() { u64::MAX } else { segment_mask(&core.sys.segments[seg::SS]) }
}

/// Width mask of the stack pointer with `ss` outside 64-bit mode.
#[inline]
pub(crate) fn segment_mask(ss: &Segment) -> u64 {
    if ss.big() { 0xffff_ffff } else { 0xffff }
}

/// Writes the part of RSP that a stack of width `mask` has.
#[inline]
pub(crate) fn set_pointer(core: &mut Core, value: u64, mask: u64) {
    let value = if mask == 0xffff { (core.gpr(4) & !mask) | (value & mask) } else { value & mask };
    core.set_gpr(4, value);
}

/// A little-endian value of `bytes` (2, 4 or 8 bytes).
fn value_of(bytes: &[u8]) -> u64 {
    let mut all = [0u8; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(all)
}

/// Reads up the current stack; nothing is committed until [`Pops::commit`].
pub(crate) struct Pops {
    pointer: u64,
    mask: u64,
    /// Bytes read ahead, from `pointer` on.
    ahead: [u8; 40],
    /// How many of them are left, at the end of the buffer.
    left: usize,
}

impl Pops {
    /// From the current top.
    pub(crate) fn new(core: &Core) -> Pops {
        let mask = mask(core);
        Pops { pointer: core.gpr(4) & mask, mask, ahead: [0; 40], left: 0 }
    }

    /// Reads `len` bytes (at most 40) at once, all of which will be popped.
    pub(crate) fn read_ahead(&mut self, core: &mut Core, len: usize) -> Result<()> {
        let at = core.linear(seg::SS, self.pointer, len, false)?;
        let from = self.ahead.len() - len;
        core.read(at, &mut self.ahead[from..], Privilege::Current)?;
        self.left = len;
        Ok(())
    }

    /// The next `size` bytes.
    pub(crate) fn pop(&mut self, core: &mut Core, size: u8) -> Result<u64> {
        let size = usize::from(size);
        if size <= self.left {
            let from = self.ahead.len() - self.left;
            let value = value_of(&self.ahead[from..from + size]);
            self.left -= size;
            self.pointer = self.pointer.wrapping_add(size as u64) & self.mask;
            return Ok(value);
        }
        let at = core.linear(seg::SS, self.pointer, size, false)?;
        let mut bytes = [0u8; 8];
        core.read(at, &mut bytes[..size], Privilege::Current)?;
        self.skip(size as u64);
        Ok(value_of(&bytes[..size]))
    }

    /// Passes over `bytes`.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.left = 0;
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }

    /// Makes the position the stack pointer.
    pub(crate) fn commit(self, core: &mut Core) {
        set_pointer(core, self.pointer, self.mask);
    }
}

/// Values to be pushed, first pushed first.
pub(crate) struct Frame {
    bytes: [u8; 160],
    at: usize,
    size: usize,
}

impl Frame {
    /// An empty frame of elements of `size` bytes.
    pub(crate) fn new(size: u8) -> Frame {
        Frame { bytes: [0; 160], at: 160, size: usize::from(size) }
    }

    /// Adds an element, cut to the element size. At most 20 elements of 8 bytes or 40 of 4.
    pub(crate) fn push(&mut self, value: u64) {
        self.at -= self.size;
        self.bytes[self.at..self.at + self.size].copy_from_slice(&value.to_le_bytes()[..self.size]);
    }

    fn data(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

/// A stack that a frame goes to, perhaps not the current one.
pub(crate) struct Target {
    /// The stack segment; `None`: flat, in 64-bit mode.
    pub segment: Option<Segment>,
    /// Stack pointer before the pushes.
    pub pointer: u64,
    /// Who writes.
    pub privilege: Privilege,
    /// Error code of #SS for a frame that does not fit.
    pub error: u32,
}

impl Target {
    /// The current stack.
    pub(crate) fn current(core: &Core, error: u32) -> Target {
        let segment = (!core.is_64bit()).then(|| core.sys.segments[seg::SS]);
        Target { segment, pointer: core.gpr(4) & mask(core), privilege: Privilege::Current, error }
    }

    fn mask(&self) -> u64 {
        self.segment.as_ref().map_or(u64::MAX, segment_mask)
    }

    fn linear(&self, offset: u64, len: u64) -> Result<u64> {
        let fault = || Trap::ss(self.error);
        let last = offset.wrapping_add(len - 1);
        match &self.segment {
            None if canonical(offset) && canonical(last) => Ok(offset),
            Some(ss) if inside(ss, offset, last) => Ok(ss.base.wrapping_add(offset) & 0xffff_ffff),
            _ => Err(fault()),
        }
    }

    /// Writes the frame below the pointer. Returns the new pointer and the mask of its width.
    pub(crate) fn place(&self, core: &mut Core, frame: &Frame) -> Result<(u64, u64)> {
        let data = frame.data();
        let mask = self.mask();
        let len = data.len() as u64;
        let top = self.pointer.wrapping_sub(len) & mask;
        if top.wrapping_add(len - 1) & mask >= top {
            let at = self.linear(top, len)?;
            core.write(at, data, self.privilege)?;
        } else {
            // The stack wraps within its segment: element by element, checked before written.
            for write in [false, true] {
                for (n, element) in data.chunks(frame.size).enumerate() {
                    let offset = top.wrapping_add((n * frame.size) as u64) & mask;
                    let at = self.linear(offset, frame.size as u64)?;
                    if write {
                        core.write(at, element, self.privilege)?;
                    } else {
                        core.probe_write(at, element.len(), self.privilege)?;
                    }
                }
            }
        }
        Ok((top, mask))
    }
}

/// Whether offsets `first..=last` are within the limit of a stack segment.
fn inside(ss: &Segment, first: u64, last: u64) -> bool {
    if ss.unusable() {
        return false;
    }
    let limit = u64::from(ss.limit);
    if ss.rights & 0xc == 4 && ss.is_code_or_data() {
        first > limit && last <= segment_mask(ss)
    } else {
        last <= limit
    }
}

/// Pushes one element on the current stack and commits.
pub(crate) fn push(core: &mut Core, value: u64, size: u8) -> Result<()> {
    let mut frame = Frame::new(size);
    frame.push(value);
    let (pointer, mask) = Target::current(core, 0).place(core, &frame)?;
    set_pointer(core, pointer, mask);
    Ok(())
}
