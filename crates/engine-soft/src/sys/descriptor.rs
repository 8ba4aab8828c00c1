//! Segment descriptors: finding, checking and loading them, and the instructions that do only that.
//!
//! Source: Intel SDM vol. 3A, 3.4-3.5 and 6.7; the loading instructions in vol. 2.

use iced_x86::{Code, Instruction, OpKind};
use wardian_cpu::bits::cr4;
use wardian_cpu::{DescriptorTable, Segment};

use super::{
    advance, canonical, need_cpl0, need_protected, register, set_register, set_zf, stack, store_word,
    word_operand,
};
use crate::access::segment_number;
use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

/// System descriptor types (Intel SDM vol. 3A, table 3-2).
pub(crate) mod kind {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INT16: u32 = 6;
    pub const TRAP16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL: u32 = 12;
    pub const INT: u32 = 14;
    pub const TRAP: u32 = 15;
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Its first eight bytes.
    pub raw: u64,
    /// Its linear address.
    pub at: u64,
}

impl Entry {
    /// Type, bits 0-3.
    pub(crate) fn kind(self) -> u32 {
        (self.raw >> 40) as u32 & 15
    }
    /// Code or data (S).
    pub(crate) fn is_code_or_data(self) -> bool {
        self.raw & (1 << 44) != 0
    }
    /// A system descriptor of type `kind`.
    pub(crate) fn is_system(self, kind: u32) -> bool {
        !self.is_code_or_data() && self.kind() == kind
    }
    pub(crate) fn is_code(self) -> bool {
        self.raw & (0b11 << 43) == 0b11 << 43
    }
    pub(crate) fn is_conforming_code(self) -> bool {
        self.is_code() && self.raw & (1 << 42) != 0
    }
    pub(crate) fn is_writable_data(self) -> bool {
        self.raw & (0b11 << 43) == 0b10 << 43 && self.raw & (1 << 41) != 0
    }
    /// Data, or code that may be read.
    pub(crate) fn is_readable(self) -> bool {
        self.is_code_or_data() && (!self.is_code() || self.raw & (1 << 41) != 0)
    }
    pub(crate) fn dpl(self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    pub(crate) fn present(self) -> bool {
        self.raw & (1 << 47) != 0
    }
    /// L, of a code segment.
    pub(crate) fn long(self) -> bool {
        self.raw & (1 << 53) != 0
    }
    /// D/B.
    pub(crate) fn big(self) -> bool {
        self.raw & (1 << 54) != 0
    }
    /// Limit in bytes.
    pub(crate) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | ((self.raw >> 32) as u32 & 0xf_0000);
        if self.raw & (1 << 55) != 0 { limit << 12 | 0xfff } else { limit }
    }
    pub(crate) fn base(self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 56 << 24)
    }
    /// As a loaded segment register.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), rights: (self.raw >> 40) as u32 & 0xf0ff }
    }
}

/// Whether `selector` is a null selector.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The selector part of an error code.
pub(crate) fn code_of(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// A segment register that holds a null selector; `dpl` matters for SS.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, base: 0, limit: 0, rights: Segment::UNUSABLE | u32::from(dpl) << 5 }
}

fn table_of(core: &Core, selector: u16) -> Option<(u64, u32)> {
    if selector & 4 == 0 {
        return Some((core.sys.gdtr.base, u32::from(core.sys.gdtr.limit)));
    }
    let ldt = &core.sys.ldtr;
    (!ldt.unusable()).then_some((ldt.base, ldt.limit))
}

fn in_mode(core: &Core, linear: u64) -> u64 {
    if core.long_mode() { linear } else { linear & 0xffff_ffff }
}

/// The descriptor of `selector`; `None` when the table does not reach that far.
pub(crate) fn fetch(core: &mut Core, selector: u16) -> Result<Option<Entry>> {
    let Some((base, limit)) = table_of(core, selector) else { return Ok(None) };
    if u32::from(selector | 7) > limit {
        return Ok(None);
    }
    let at = in_mode(core, base.wrapping_add(u64::from(selector & !7)));
    Ok(Some(Entry { raw: core.read_u64(at, Privilege::Supervisor)?, at }))
}

/// The second half of a 16-byte system descriptor; `None` outside the table or if its type field is not zero.
pub(crate) fn fetch_high(core: &mut Core, selector: u16, entry: Entry) -> Result<Option<u64>> {
    match table_of(core, selector) {
        Some((_, limit)) if u32::from(selector & !7) + 15 <= limit => {}
        _ => return Ok(None),
    }
    let high = core.read_u64(entry.at.wrapping_add(8), Privilege::Supervisor)?;
    Ok((high >> 40 & 0x1f == 0).then_some(high))
}

/// Sets the accessed bit of a code or data descriptor.
pub(crate) fn set_accessed(core: &mut Core, entry: &mut Entry) -> Result<()> {
    if entry.raw & (1 << 40) == 0 {
        entry.raw |= 1 << 40;
        core.write_u8(entry.at.wrapping_add(5), (entry.raw >> 40) as u8, Privilege::Supervisor)?;
    }
    Ok(())
}

/// A segment register loaded in real or virtual-8086 mode (Intel SDM vol. 3B, 22.1.1). Real mode keeps limit and
/// size of what was loaded in protected mode.
pub(crate) fn real_segment(core: &Core, index: usize, selector: u16) -> Segment {
    let base = u64::from(selector) << 4;
    if core.v86() {
        return Segment { selector, base, limit: 0xffff, rights: 0xf3 };
    }
    let old = core.sys.segments[index];
    let kind = if index == seg::CS { 0x9b } else { 0x93 };
    if old.unusable() {
        return Segment { selector, base, limit: 0xffff, rights: kind };
    }
    Segment { selector, base, limit: old.limit, rights: (old.rights & 0xd000) | kind }
}

/// Checks a data-segment (or SS) selector and returns what the register would hold; marks it accessed.
fn data_segment(core: &mut Core, index: usize, selector: u16) -> Result<Segment> {
    if !core.protected() || core.v86() {
        return Ok(real_segment(core, index, selector));
    }
    let cpl = core.cpl();
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if index == seg::SS && (!core.is_64bit() || cpl == 3 || rpl != cpl) {
            return Err(Trap::gp(0));
        }
        return Ok(null_segment(selector, if index == seg::SS { cpl } else { 0 }));
    }
    let fault = || Trap::gp(code_of(selector));
    let mut entry = fetch(core, selector)?.ok_or_else(fault)?;
    if index == seg::SS {
        if rpl != cpl || !entry.is_writable_data() || entry.dpl() != cpl {
            return Err(fault());
        }
        if !entry.present() {
            return Err(Trap::ss(code_of(selector)));
        }
    } else {
        if !entry.is_readable() {
            return Err(fault());
        }
        if !entry.is_conforming_code() && (rpl > entry.dpl() || cpl > entry.dpl()) {
            return Err(fault());
        }
        if !entry.present() {
            return Err(Trap::np(code_of(selector)));
        }
    }
    set_accessed(core, &mut entry)?;
    Ok(entry.segment(selector))
}

/// Loads ES, SS, DS, FS or GS with every check of the mode.
pub(crate) fn load(core: &mut Core, index: usize, selector: u16) -> Result<()> {
    let segment = data_segment(core, index, selector)?;
    core.set_segment(index, segment);
    Ok(())
}

/// After a return to an outer level: data segments that the new level may not use become null.
pub(crate) fn drop_inner_segments(core: &mut Core) {
    let cpl = core.cpl();
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let s = core.sys.segments[index];
        let conforming = s.kind() & 0b1100 == 0b1100;
        if !s.unusable() && !conforming && s.dpl() < cpl {
            core.set_segment(index, null_segment(0, 0));
        }
    }
}

/// Checks a stack segment for a return to level `rpl`; a null one is allowed when `null_allowed`.
pub(crate) fn outer_stack(core: &mut Core, selector: u16, rpl: u8, null_allowed: bool) -> Result<Segment> {
    if is_null(selector) {
        if null_allowed && (selector & 3) as u8 == rpl {
            return Ok(null_segment(selector, rpl));
        }
        return Err(Trap::gp(0));
    }
    let fault = || Trap::gp(code_of(selector));
    let mut entry = fetch(core, selector)?.ok_or_else(fault)?;
    if (selector & 3) as u8 != rpl || !entry.is_writable_data() || entry.dpl() != rpl {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::ss(code_of(selector)));
    }
    set_accessed(core, &mut entry)?;
    Ok(entry.segment(selector))
}

/// What CS holds after `entry` is loaded at privilege level `cpl`. In 64-bit mode the base counts as zero.
pub(crate) fn code_segment(core: &mut Core, mut entry: Entry, selector: u16, cpl: u8) -> Result<Segment> {
    set_accessed(core, &mut entry)?;
    let mut cs = entry.segment(selector & !3 | u16::from(cpl));
    if core.long_mode() && cs.long() {
        cs.base = 0;
    }
    Ok(cs)
}

/// Segment number of operand `operand`, a segment register.
fn segment_operand(insn: &Instruction, operand: u32) -> usize {
    segment_number(insn.op_register(operand))
}

fn shadow_after_ss(core: &mut Core, index: usize) {
    if index == seg::SS && !core.sys.interrupt_shadow {
        core.sys.interrupt_shadow = true;
    }
}

/// MOV Sreg, r/m16.
pub(crate) fn mov_to_segment(core: &mut Core, insn: &Instruction) -> Result<()> {
    let index = segment_operand(insn, 0);
    if index == seg::CS {
        return Err(Trap::ud());
    }
    let selector = word_operand(core, insn, 1)?;
    load(core, index, selector)?;
    advance(core, insn);
    shadow_after_ss(core, index);
    Ok(())
}

/// MOV r/m, Sreg.
pub(crate) fn mov_from_segment(core: &mut Core, insn: &Instruction) -> Result<()> {
    let selector = core.sys.segments[segment_operand(insn, 1)].selector;
    store_word(core, insn, u64::from(selector))?;
    advance(core, insn);
    Ok(())
}

/// Operand size of PUSH and POP of a segment register.
fn stack_size(insn: &Instruction) -> u8 {
    insn.stack_pointer_increment().unsigned_abs() as u8
}

/// PUSH Sreg.
pub(crate) fn push_segment(core: &mut Core, insn: &Instruction) -> Result<()> {
    let selector = core.sys.segments[segment_operand(insn, 0)].selector;
    stack::push(core, u64::from(selector), stack_size(insn))?;
    advance(core, insn);
    Ok(())
}

/// POP Sreg.
pub(crate) fn pop_segment(core: &mut Core, insn: &Instruction) -> Result<()> {
    let index = segment_operand(insn, 0);
    let mut stack = stack::Pops::new(core);
    let selector = stack.pop(core, stack_size(insn))? as u16;
    load(core, index, selector)?;
    stack.commit(core);
    advance(core, insn);
    shadow_after_ss(core, index);
    Ok(())
}

/// LDS, LES, LSS, LFS, LGS.
pub(crate) fn load_far(core: &mut Core, insn: &Instruction, index: usize) -> Result<()> {
    if insn.op1_kind() != OpKind::Memory {
        return Err(Trap::ud());
    }
    let size = insn.op0_register().size();
    let at = core.operand_address(insn, size + 2, false)?;
    let mut bytes = [0u8; 16];
    core.read(at, &mut bytes[..size + 2], Privilege::Current)?;
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    bytes[size..].fill(0);
    let offset = u128::from_le_bytes(bytes) as u64;
    load(core, index, selector)?;
    set_register(core, insn.op0_register(), offset);
    advance(core, insn);
    Ok(())
}

/// The base of an LDT or TSS descriptor with its high half in IA-32e mode.
fn system_segment(core: &mut Core, selector: u16, entry: Entry) -> Result<Segment> {
    let mut segment = entry.segment(selector);
    if core.long_mode() {
        let fault = || Trap::gp(code_of(selector));
        let high = fetch_high(core, selector, entry)?.ok_or_else(fault)?;
        segment.base |= high << 32;
        if !canonical(segment.base) {
            return Err(fault());
        }
    }
    Ok(segment)
}

/// LLDT.
pub(crate) fn lldt(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_protected(core)?;
    need_cpl0(core)?;
    let selector = word_operand(core, insn, 0)?;
    let ldtr = if is_null(selector) {
        null_segment(selector, 0)
    } else {
        let fault = || Trap::gp(code_of(selector));
        if selector & 4 != 0 {
            return Err(fault());
        }
        let entry = fetch(core, selector)?.ok_or_else(fault)?;
        if !entry.is_system(kind::LDT) {
            return Err(fault());
        }
        if !entry.present() {
            return Err(Trap::np(code_of(selector)));
        }
        system_segment(core, selector, entry)?
    };
    core.sys.ldtr = ldtr;
    advance(core, insn);
    Ok(())
}

/// LTR.
pub(crate) fn ltr(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_protected(core)?;
    need_cpl0(core)?;
    let selector = word_operand(core, insn, 0)?;
    let fault = || Trap::gp(code_of(selector));
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault());
    }
    let mut entry = fetch(core, selector)?.ok_or_else(fault)?;
    if !(entry.is_system(kind::TSS) || (entry.is_system(kind::TSS16) && !core.long_mode())) {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::np(code_of(selector)));
    }
    let mut tr = system_segment(core, selector, entry)?;
    set_busy(core, &mut entry, true)?;
    tr.rights |= 2;
    core.sys.tr = tr;
    advance(core, insn);
    Ok(())
}

/// Sets or clears the busy bit of a TSS descriptor.
pub(crate) fn set_busy(core: &mut Core, entry: &mut Entry, busy: bool) -> Result<()> {
    let old = entry.raw;
    entry.raw = if busy { old | 1 << 41 } else { old & !(1 << 41) };
    core.write_u8(entry.at.wrapping_add(5), (entry.raw >> 40) as u8, Privilege::Supervisor)
}

/// #GP(0) if user code runs and CR4.UMIP is set.
pub(crate) fn check_umip(core: &Core) -> Result<()> {
    if core.sys.cr4 & cr4::UMIP != 0 && core.cpl() > 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

/// SLDT and STR.
pub(crate) fn store_selector(core: &mut Core, insn: &Instruction, selector: u16) -> Result<()> {
    need_protected(core)?;
    check_umip(core)?;
    store_word(core, insn, u64::from(selector))?;
    advance(core, insn);
    Ok(())
}

/// The descriptor of `selector` if LAR or LSL may see it; `gates`: types other than segments count.
fn visible(core: &mut Core, selector: u16, gates: bool) -> Result<Option<Entry>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(entry) = fetch(core, selector)? else { return Ok(None) };
    if !entry.is_code_or_data() {
        let long = core.long_mode();
        let known = match entry.kind() {
            kind::LDT | kind::TSS | kind::TSS_BUSY => true,
            kind::TSS16 | kind::TSS16_BUSY => !long,
            kind::CALL16 | kind::TASK_GATE => gates && !long,
            kind::CALL => gates,
            _ => false,
        };
        if !known || (long && fetch_high(core, selector, entry)?.is_none()) {
            return Ok(None);
        }
    }
    let dpl = entry.dpl();
    let allowed = entry.is_conforming_code() || (core.cpl() <= dpl && (selector & 3) as u8 <= dpl);
    Ok(allowed.then_some(entry))
}

/// LAR. Processors hand out bits 8-23 of the descriptor's second half, the limit's upper bits among them.
pub(crate) fn lar(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_protected(core)?;
    let selector = word_operand(core, insn, 1)?;
    let entry = visible(core, selector, true)?;
    if let Some(entry) = entry {
        set_register(core, insn.op0_register(), entry.raw >> 32 & 0x00ff_ff00);
    }
    set_zf(core, entry.is_some());
    advance(core, insn);
    Ok(())
}

/// LSL.
pub(crate) fn lsl(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_protected(core)?;
    let selector = word_operand(core, insn, 1)?;
    let entry = visible(core, selector, false)?;
    if let Some(entry) = entry {
        set_register(core, insn.op0_register(), u64::from(entry.limit()));
    }
    set_zf(core, entry.is_some());
    advance(core, insn);
    Ok(())
}

/// VERR and VERW.
pub(crate) fn verify(core: &mut Core, insn: &Instruction, write: bool) -> Result<()> {
    need_protected(core)?;
    let selector = word_operand(core, insn, 0)?;
    let entry = if is_null(selector) { None } else { fetch(core, selector)? };
    let cpl = core.cpl();
    let good = entry.is_some_and(|entry| {
        let kind = if write { entry.is_writable_data() } else { entry.is_readable() };
        let dpl = entry.dpl();
        kind && (entry.is_conforming_code() || (cpl <= dpl && (selector & 3) as u8 <= dpl))
    });
    set_zf(core, good);
    advance(core, insn);
    Ok(())
}

/// ARPL (outside 64-bit mode).
pub(crate) fn arpl(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_protected(core)?;
    let to = word_operand(core, insn, 0)?;
    let from = register(core, insn.op1_register()) as u16;
    let raise = to & 3 < from & 3;
    if raise {
        let adjusted = to & !3 | from & 3;
        if insn.op0_kind() == OpKind::Register {
            // The word alone changes, whatever the operand size.
            let index = insn.op0_register().number();
            core.set_gpr(index, core.gpr(index) & !0xffff | u64::from(adjusted));
        } else {
            store_word(core, insn, u64::from(adjusted))?;
        }
    }
    set_zf(core, raise);
    advance(core, insn);
    Ok(())
}

/// SGDT and SIDT.
pub(crate) fn store_table(core: &mut Core, insn: &Instruction, table: DescriptorTable) -> Result<()> {
    check_umip(core)?;
    let len = if core.is_64bit() { 10 } else { 6 };
    let mut bytes = [0u8; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let at = core.operand_address(insn, len, true)?;
    core.write(at, &bytes[..len], Privilege::Current)?;
    advance(core, insn);
    Ok(())
}

/// LGDT and LIDT.
pub(crate) fn load_table(core: &mut Core, insn: &Instruction, global: bool) -> Result<()> {
    need_cpl0(core)?;
    let len = if core.is_64bit() { 10 } else { 6 };
    let at = core.operand_address(insn, len, false)?;
    let mut bytes = [0u8; 10];
    core.read(at, &mut bytes[..len], Privilege::Current)?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0u8; 8];
    base.copy_from_slice(&bytes[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if core.is_64bit() && !canonical(base) {
        return Err(Trap::gp(0));
    }
    let table = DescriptorTable { base, limit };
    if global {
        core.sys.gdtr = table;
    } else {
        core.sys.idtr = table;
    }
    advance(core, insn);
    Ok(())
}

/// Sets the base of FS or GS, and nothing else of it.
#[inline]
pub(crate) fn set_base(core: &mut Core, index: usize, base: u64) {
    core.sys.segments[index].base = base;
    core.ctx.get_mut().seg_base[index] = base;
}

/// SWAPGS.
pub(crate) fn swapgs(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !core.is_64bit() {
        return Err(Trap::ud());
    }
    need_cpl0(core)?;
    let base = core.c().seg_base[seg::GS];
    set_base(core, seg::GS, core.c().kernel_gs_base);
    core.ctx.get_mut().kernel_gs_base = base;
    advance(core, insn);
    Ok(())
}

fn need_fsgsbase(core: &Core) -> Result<()> {
    if core.is_64bit() && core.sys.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Trap::ud()) }
}

/// RDFSBASE and RDGSBASE.
pub(crate) fn read_base(core: &mut Core, insn: &Instruction, index: usize) -> Result<()> {
    need_fsgsbase(core)?;
    let base = core.c().seg_base[index];
    set_register(core, insn.op0_register(), base);
    advance(core, insn);
    Ok(())
}

/// WRFSBASE and WRGSBASE.
pub(crate) fn write_base(core: &mut Core, insn: &Instruction, index: usize) -> Result<()> {
    need_fsgsbase(core)?;
    let base = register(core, insn.op0_register());
    if !canonical(base) {
        return Err(Trap::gp(0));
    }
    set_base(core, index, base);
    advance(core, insn);
    Ok(())
}
