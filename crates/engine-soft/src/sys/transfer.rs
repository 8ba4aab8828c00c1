//! Transfers of control that change CS or the privilege level: far JMP, CALL, RET, IRET, INT, SYSCALL, SYSENTER.
//!
//! Source: the pseudo-code of Intel SDM vol. 2; AMD APM vol. 2, 6.1 for SYSCALL outside 64-bit mode.

use iced_x86::{Code, Instruction, OpKind};
use wardian_cpu::Segment;
use wardian_cpu::bits::{efer, rflags, vector};

use super::deliver::{self, inner_pointer, inner_stack};
use super::descriptor::{self, Entry, code_of, is_null, kind};
use super::stack::{self, Frame, Pops, Target};
use super::task::{self, Cause};
use super::{canonical, clear_rf, need_cpl0};
use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

fn size_bits(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (u32::from(size) * 8)) - 1 }
}

/// #GP(0) unless `offset` can be fetched from in the segment that `entry` describes.
fn check_target(core: &Core, entry: Entry, offset: u64) -> Result<()> {
    let good =
        if core.long_mode() && entry.long() { canonical(offset) } else { offset <= u64::from(entry.limit()) };
    if good { Ok(()) } else { Err(Trap::gp(0)) }
}

/// Loads CS and RIP; everything is checked.
fn enter(core: &mut Core, cs: Segment, offset: u64) {
    core.set_segment(seg::CS, cs);
    core.set_rip(offset);
    clear_rf(core);
}

/// Far JMP or CALL in real and V86 mode.
fn real_far(core: &mut Core, selector: u16, offset: u64) -> Result<Segment> {
    let cs = descriptor::real_segment(core, seg::CS, selector);
    if offset > u64::from(cs.limit) { Err(Trap::gp(0)) } else { Ok(cs) }
}

/// Selector, offset and operand size of a far JMP or CALL.
fn far_target(core: &mut Core, insn: &Instruction) -> Result<(u16, u64, u8)> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => return Ok((insn.far_branch_selector(), u64::from(insn.far_branch16()), 2)),
        OpKind::FarBranch32 => return Ok((insn.far_branch_selector(), u64::from(insn.far_branch32()), 4)),
        _ => {}
    }
    let size = match insn.code() {
        Code::Jmp_m1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1632 | Code::Call_m1632 => 4,
        _ => 8,
    };
    let len = usize::from(size) + 2;
    let at = core.operand_address(insn, len, false)?;
    let mut bytes = [0u8; 10];
    core.read(at, &mut bytes[..len], Privilege::Current)?;
    let selector = u16::from_le_bytes([bytes[len - 2], bytes[len - 1]]);
    let mut offset = [0u8; 8];
    offset[..len - 2].copy_from_slice(&bytes[..len - 2]);
    Ok((selector, u64::from_le_bytes(offset), size))
}

/// The descriptor that a far transfer names.
fn far_entry(core: &mut Core, selector: u16) -> Result<Entry> {
    if is_null(selector) {
        return Err(Trap::gp(0));
    }
    descriptor::fetch(core, selector)?.ok_or_else(|| Trap::gp(code_of(selector)))
}

/// A code segment as the direct target of JMP or CALL.
fn check_direct(core: &Core, entry: Entry, selector: u16) -> Result<()> {
    let cpl = core.cpl();
    let allowed = if entry.is_conforming_code() {
        entry.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && entry.dpl() == cpl
    };
    if !allowed || (core.long_mode() && entry.long() && entry.big()) {
        return Err(Trap::gp(code_of(selector)));
    }
    if entry.present() { Ok(()) } else { Err(Trap::np(code_of(selector))) }
}

/// A call gate: target selector, offset, code entry.
fn through_gate(core: &mut Core, selector: u16, gate: Entry, call: bool) -> Result<(u16, u64, Entry)> {
    let code = code_of(selector);
    let long = core.long_mode();
    if gate.dpl() < core.cpl() || gate.dpl() < (selector & 3) as u8 {
        return Err(Trap::gp(code));
    }
    let mut offset = gate.raw & 0xffff;
    if gate.kind() == kind::CALL {
        offset |= gate.raw >> 32 & 0xffff_0000;
    }
    if long {
        offset |= descriptor::fetch_high(core, selector, gate)?.ok_or_else(|| Trap::gp(code))? << 32;
    }
    if !gate.present() {
        return Err(Trap::np(code));
    }
    let target = (gate.raw >> 16) as u16;
    let entry = far_entry(core, target)?;
    let cpl = core.cpl();
    let level = match (entry.is_conforming_code(), call) {
        (true, _) | (false, true) => entry.dpl() <= cpl,
        (false, false) => entry.dpl() == cpl,
    };
    if !entry.is_code() || !level || (long && (!entry.long() || entry.big())) {
        return Err(Trap::gp(code_of(target)));
    }
    if !entry.present() {
        return Err(Trap::np(code_of(target)));
    }
    Ok((target, offset, entry))
}

/// What a system descriptor in a far JMP or CALL is; others are #GP.
fn is_gate(core: &Core, entry: Entry) -> bool {
    let k = entry.kind();
    !entry.is_code_or_data() && (k == kind::CALL || (k == kind::CALL16 && !core.long_mode()))
}

fn is_task(core: &Core, entry: Entry) -> bool {
    let k = entry.kind();
    !core.long_mode() && !entry.is_code_or_data() && matches!(k, kind::TSS16 | kind::TASK_GATE | kind::TSS)
}

/// JMP far.
pub(crate) fn jmp_far(core: &mut Core, insn: &Instruction) -> Result<()> {
    let (selector, offset, _) = far_target(core, insn)?;
    if !core.protected() || core.v86() {
        let cs = real_far(core, selector, offset)?;
        enter(core, cs, offset);
        return Ok(());
    }
    let entry = far_entry(core, selector)?;
    let (selector, offset, entry) = if entry.is_code() {
        check_direct(core, entry, selector)?;
        (selector, offset, entry)
    } else if is_gate(core, entry) {
        through_gate(core, selector, entry, false)?
    } else if is_task(core, entry) {
        return task::through_far(core, selector, entry, Cause::Jump, insn.next_ip());
    } else {
        return Err(Trap::gp(code_of(selector)));
    };
    check_target(core, entry, offset)?;
    let cpl = core.cpl();
    let cs = descriptor::code_segment(core, entry, selector, cpl)?;
    enter(core, cs, offset);
    Ok(())
}

/// Pushes CS and the return address on the current stack, then enters.
fn call_same_level(core: &mut Core, cs: Segment, offset: u64, next: u64, size: u8, flat: bool) -> Result<()> {
    let mut frame = Frame::new(size);
    frame.push(u64::from(core.sys.segments[seg::CS].selector));
    frame.push(next);
    let mut target = Target::current(core, 0);
    if flat {
        target.segment = None;
    }
    let (pointer, mask) = target.place(core, &frame)?;
    stack::set_pointer(core, pointer, mask);
    enter(core, cs, offset);
    Ok(())
}

/// CALL far.
pub(crate) fn call_far(core: &mut Core, insn: &Instruction) -> Result<()> {
    let (selector, offset, size) = far_target(core, insn)?;
    let next = insn.next_ip() & size_bits(size);
    if !core.protected() || core.v86() {
        let cs = real_far(core, selector, offset)?;
        return call_same_level(core, cs, offset, next, size, false);
    }
    let entry = far_entry(core, selector)?;
    let cpl = core.cpl();
    if entry.is_code() {
        check_direct(core, entry, selector)?;
        check_target(core, entry, offset)?;
        let cs = descriptor::code_segment(core, entry, selector, cpl)?;
        return call_same_level(core, cs, offset, next, size, false);
    }
    if is_task(core, entry) {
        return task::through_far(core, selector, entry, Cause::Nest, insn.next_ip());
    }
    if !is_gate(core, entry) {
        return Err(Trap::gp(code_of(selector)));
    }
    let gate = entry;
    let (target, offset, entry) = through_gate(core, selector, gate, true)?;
    let long = core.long_mode();
    let size = match (long, gate.kind()) {
        (true, _) => 8,
        (false, kind::CALL) => 4,
        _ => 2,
    };
    let next = insn.next_ip();
    if entry.is_conforming_code() || entry.dpl() == cpl {
        check_target(core, entry, offset)?;
        let cs = descriptor::code_segment(core, entry, target, cpl)?;
        return call_same_level(core, cs, offset, next, size, long);
    }

    // To an inner level.
    let level = entry.dpl();
    let mut frame = Frame::new(size);
    frame.push(u64::from(core.sys.segments[seg::SS].selector));
    frame.push(core.gpr(4));
    let (ss, stack) = if long {
        let pointer = inner_pointer(core, level, 0, 0)?;
        let ss = descriptor::null_segment(u16::from(level), level);
        (ss, Target { segment: None, pointer, privilege: Privilege::Supervisor, error: 0 })
    } else {
        let (ss, pointer) = inner_stack(core, level, 0)?;
        let mut parameters = [0u64; 31];
        let count = (gate.raw >> 32) as usize & 31;
        let mut pops = Pops::new(core);
        for parameter in &mut parameters[..count] {
            *parameter = pops.pop(core, size)?;
        }
        for parameter in parameters[..count].iter().rev() {
            frame.push(*parameter);
        }
        let error = code_of(ss.selector);
        (ss, Target { segment: Some(ss), pointer, privilege: Privilege::Supervisor, error })
    };
    frame.push(u64::from(core.sys.segments[seg::CS].selector));
    frame.push(next);
    check_target(core, entry, offset)?;
    let cs = descriptor::code_segment(core, entry, target, level)?;
    let (pointer, mask) = stack.place(core, &frame)?;
    core.set_segment(seg::SS, ss);
    core.set_cpl(level);
    stack::set_pointer(core, pointer, mask);
    enter(core, cs, offset);
    Ok(())
}

/// The code segment that RET or IRET returns to.
fn return_code(core: &mut Core, selector: u16) -> Result<Entry> {
    let entry = far_entry(core, selector)?;
    let rpl = (selector & 3) as u8;
    let level = if entry.is_conforming_code() { entry.dpl() <= rpl } else { entry.dpl() == rpl };
    let both = core.long_mode() && entry.long() && entry.big();
    if !entry.is_code() || rpl < core.cpl() || !level || both {
        return Err(Trap::gp(code_of(selector)));
    }
    if entry.present() { Ok(entry) } else { Err(Trap::np(code_of(selector))) }
}

/// Width of the stack pointer that a return to `entry` on `ss` loads.
fn return_mask(core: &Core, entry: Entry, ss: &Segment) -> u64 {
    if core.long_mode() && entry.long() { u64::MAX } else { stack::segment_mask(ss) }
}

/// RET far.
pub(crate) fn retf(core: &mut Core, insn: &Instruction) -> Result<()> {
    let (size, release) = match insn.code() {
        Code::Retfw => (2, 0),
        Code::Retfw_imm16 => (2, insn.immediate16()),
        Code::Retfd => (4, 0),
        Code::Retfd_imm16 => (4, insn.immediate16()),
        Code::Retfq_imm16 => (8, insn.immediate16()),
        _ => (8, 0),
    };
    let release = u64::from(release);
    let mut pops = Pops::new(core);
    let offset = pops.pop(core, size)?;
    let selector = pops.pop(core, size)? as u16;
    if !core.protected() || core.v86() {
        let cs = real_far(core, selector, offset)?;
        pops.skip(release);
        pops.commit(core);
        enter(core, cs, offset);
        return Ok(());
    }
    let entry = return_code(core, selector)?;
    let rpl = (selector & 3) as u8;
    if rpl == core.cpl() {
        check_target(core, entry, offset)?;
        let cs = descriptor::code_segment(core, entry, selector, rpl)?;
        pops.skip(release);
        pops.commit(core);
        enter(core, cs, offset);
        return Ok(());
    }
    pops.skip(release);
    let pointer = pops.pop(core, size)?;
    let ss = pops.pop(core, size)? as u16;
    let null_allowed = core.long_mode() && entry.long() && rpl != 3;
    let ss = descriptor::outer_stack(core, ss, rpl, null_allowed)?;
    check_target(core, entry, offset)?;
    let cs = descriptor::code_segment(core, entry, selector, rpl)?;
    let mask = return_mask(core, entry, &ss);
    core.set_segment(seg::SS, ss);
    core.set_cpl(rpl);
    stack::set_pointer(core, pointer.wrapping_add(release), mask);
    enter(core, cs, offset);
    descriptor::drop_inner_segments(core);
    Ok(())
}

/// RFLAGS after IRET of operand size `size` at privilege level `cpl` in protected mode pops `popped`.
pub(crate) fn returned_flags(old: u64, popped: u64, size: u8, cpl: u8) -> u64 {
    let iopl = ((old & rflags::IOPL) >> 12) as u8;
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpl <= iopl {
        mask |= rflags::IF;
    }
    if cpl == 0 {
        mask |= rflags::IOPL;
        if size > 2 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    (old & !(mask | rflags::RF)) | (popped & mask) | rflags::FIXED
}

/// IRET, IRETD, IRETQ; `next` is the address after it.
pub(crate) fn iret(core: &mut Core, next: u64, size: u8) -> Result<()> {
    if !core.protected() || core.v86() {
        return real_iret(core, size);
    }
    let long = core.long_mode();
    let cpl = core.cpl();
    let old = core.rflags();
    if old & rflags::NT != 0 {
        if long {
            return Err(Trap::gp(0));
        }
        task::return_to_previous(core, next)?;
        core.sys.nmi_blocked = false;
        return Ok(());
    }
    let mut pops = Pops::new(core);
    if core.is_64bit() {
        pops.read_ahead(core, 5 * usize::from(size))?;
    }
    let offset = pops.pop(core, size)?;
    let selector = pops.pop(core, size)? as u16;
    let popped = pops.pop(core, size)?;
    if !long && cpl == 0 && size == 4 && popped & rflags::VM != 0 {
        return iret_to_v86(core, pops, offset, selector, popped);
    }
    let entry = return_code(core, selector)?;
    let rpl = (selector & 3) as u8;
    let to64 = long && entry.long();
    let outer = rpl > cpl;
    let mut new_stack = None;
    if outer || core.is_64bit() {
        let pointer = pops.pop(core, size)?;
        let ss = pops.pop(core, size)? as u16;
        let ss = descriptor::outer_stack(core, ss, rpl, to64 && rpl != 3)?;
        new_stack = Some((pointer, ss));
    }
    check_target(core, entry, offset)?;
    let cs = descriptor::code_segment(core, entry, selector, rpl)?;

    let flags = returned_flags(old, popped, size, cpl);
    core.set_rflags(flags);
    match new_stack {
        Some((pointer, ss)) => {
            let mask = return_mask(core, entry, &ss);
            core.set_segment(seg::SS, ss);
            stack::set_pointer(core, pointer, mask);
        }
        None => pops.commit(core),
    }
    core.set_segment(seg::CS, cs);
    core.set_rip(offset);
    if outer {
        core.set_cpl(rpl);
        descriptor::drop_inner_segments(core);
    }
    core.sys.nmi_blocked = false;
    Ok(())
}

fn real_iret(core: &mut Core, size: u8) -> Result<()> {
    let v86 = core.v86();
    let old = core.rflags();
    if v86 && old & rflags::IOPL != rflags::IOPL {
        return Err(Trap::gp(0));
    }
    let mut pops = Pops::new(core);
    let offset = pops.pop(core, size)?;
    let selector = pops.pop(core, size)? as u16;
    let popped = pops.pop(core, size)?;
    let cs = real_far(core, selector, offset)?;
    let mut keep = rflags::VM | rflags::VIF | rflags::VIP;
    if v86 {
        keep |= rflags::IOPL;
    }
    if size == 2 {
        keep |= !0xffff & !rflags::RF;
    }
    let flags = (old & keep) | (popped & !keep & 0x0025_7fd5) | rflags::FIXED;
    pops.commit(core);
    core.set_segment(seg::CS, cs);
    core.set_rip(offset);
    core.set_rflags(flags);
    core.sys.nmi_blocked = false;
    Ok(())
}

fn iret_to_v86(core: &mut Core, mut pops: Pops, offset: u64, selector: u16, popped: u64) -> Result<()> {
    let pointer = pops.pop(core, 4)?;
    let mut selectors = [0u16; 6];
    selectors[seg::CS] = selector;
    for index in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
        selectors[index] = pops.pop(core, 4)? as u16;
    }
    if offset > 0xffff {
        return Err(Trap::gp(0));
    }
    core.set_rflags((popped & 0x003f_7fd5) | rflags::FIXED);
    core.set_cpl(3);
    for (index, selector) in selectors.into_iter().enumerate() {
        let segment = descriptor::real_segment(core, index, selector);
        core.set_segment(index, segment);
    }
    core.set_gpr(4, pointer);
    core.set_rip(offset);
    core.sys.nmi_blocked = false;
    Ok(())
}

/// INT n.
pub(crate) fn int_n(core: &mut Core, insn: &Instruction, vector: u8) -> Result<()> {
    if core.v86() && core.c().rflags & rflags::IOPL != rflags::IOPL {
        return Err(Trap::gp(0));
    }
    deliver::software(core, vector, next_rip(core, insn), true)
}

/// INT3.
pub(crate) fn int3(core: &mut Core, insn: &Instruction) -> Result<()> {
    deliver::software(core, vector::BP, next_rip(core, insn), true)
}

/// INT1: a #DB that leaves DR6 alone and passes every gate.
pub(crate) fn int1(core: &mut Core, insn: &Instruction) -> Result<()> {
    deliver::software(core, vector::DB, next_rip(core, insn), false)
}

/// INTO.
pub(crate) fn into(core: &mut Core, insn: &Instruction) -> Result<()> {
    if core.is_64bit() {
        return Err(Trap::ud());
    }
    if core.rflags() & rflags::OF == 0 {
        super::advance(core, insn);
        return Ok(());
    }
    deliver::software(core, vector::OF, next_rip(core, insn), true)
}

fn next_rip(core: &Core, insn: &Instruction) -> u64 {
    let next = insn.next_ip();
    if core.is_64bit() {
        next
    } else if core.sys.segments[seg::CS].big() {
        next & 0xffff_ffff
    } else {
        next & 0xffff
    }
}

const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;

fn flat(selector: u16, rights: u32, level: u8) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, rights: rights | u32::from(level) << 5 }
}

/// Loads flat CS and SS and the privilege level.
fn flat_entry(core: &mut Core, cs: u16, ss: u16, code: u32, level: u8) {
    core.set_segment(seg::CS, flat(cs, code, level));
    core.set_segment(seg::SS, flat(ss, DATA, level));
    core.set_cpl(level);
}

fn amd(core: &Core) -> bool {
    core.model.vendor().is_amd_like()
}

/// SYSCALL; `next` is the address after it.
pub(crate) fn syscall(core: &mut Core, next: u64) -> Result<()> {
    core.counters.syscalls += 1;
    if core.sys.efer & efer::SCE == 0 || !core.protected() || (!core.is_64bit() && !amd(core)) || core.v86() {
        return Err(Trap::ud());
    }
    let flags = core.rflags() & !rflags::RF;
    let star = core.sys.star;
    let cs = (star >> 32) as u16 & !3;
    let ss = cs.wrapping_add(8);
    if !core.long_mode() {
        core.set_gpr(1, next & 0xffff_ffff);
        flat_entry(core, cs, ss, CODE32, 0);
        core.set_rip(star & 0xffff_ffff);
        core.set_rflags(flags & !(rflags::IF | rflags::VM));
        return Ok(());
    }
    let target = if core.is_64bit() { core.sys.lstar } else { core.sys.cstar };
    let next = if core.is_64bit() { next } else { next & 0xffff_ffff };
    core.set_gpr(1, next);
    core.set_gpr(11, flags);
    flat_entry(core, cs, ss, CODE64, 0);
    core.set_rip(target);
    core.set_rflags(flags & !core.sys.sfmask);
    Ok(())
}

/// SYSRET, to 64-bit code if `wide`.
pub(crate) fn sysret(core: &mut Core, wide: bool) -> Result<()> {
    if core.sys.efer & efer::SCE == 0 || !core.protected() || (!core.is_64bit() && !amd(core)) || core.v86() {
        return Err(Trap::ud());
    }
    need_cpl0(core)?;
    let star = core.sys.star;
    let base = (star >> 48) as u16 & !3;
    let target = core.gpr(1);
    if wide && !amd(core) && !canonical(target) {
        return Err(Trap::gp(0));
    }
    let ss = base.wrapping_add(8) | 3;
    if !core.long_mode() {
        flat_entry(core, base | 3, ss, CODE32, 3);
        core.set_rip(target & 0xffff_ffff);
        let flags = core.rflags();
        core.set_rflags((flags | rflags::IF) & !rflags::RF);
        return Ok(());
    }
    let flags = (core.gpr(11) & 0x003c_7fd7) | rflags::FIXED;
    if wide {
        flat_entry(core, base.wrapping_add(16) | 3, ss, CODE64, 3);
        core.set_rip(target);
    } else {
        flat_entry(core, base | 3, ss, CODE32, 3);
        core.set_rip(target & 0xffff_ffff);
    }
    core.set_rflags(flags);
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(core: &mut Core) -> Result<()> {
    let long = core.long_mode();
    if long && amd(core) {
        return Err(Trap::ud());
    }
    let cs = core.sys.sysenter_cs as u16 & !3;
    if !core.protected() || cs == 0 {
        return Err(Trap::gp(0));
    }
    let flags = core.rflags();
    core.set_rflags(flags & !(rflags::VM | rflags::IF | rflags::RF));
    flat_entry(core, cs, cs.wrapping_add(8), if long { CODE64 } else { CODE32 }, 0);
    let half = if long { u64::MAX } else { 0xffff_ffff };
    core.set_gpr(4, core.sys.sysenter_esp & half);
    core.set_rip(core.sys.sysenter_eip & half);
    Ok(())
}

/// SYSEXIT, to 64-bit code if `wide`.
pub(crate) fn sysexit(core: &mut Core, wide: bool) -> Result<()> {
    let long = core.long_mode();
    if long && amd(core) {
        return Err(Trap::ud());
    }
    let base = core.sys.sysenter_cs as u16 & !3;
    if !core.protected() || base == 0 || core.cpl() != 0 {
        return Err(Trap::gp(0));
    }
    let (rip, rsp) = (core.gpr(2), core.gpr(1));
    if wide {
        if !canonical(rip) || !canonical(rsp) {
            return Err(Trap::gp(0));
        }
        flat_entry(core, base.wrapping_add(32) | 3, base.wrapping_add(40) | 3, CODE64, 3);
        core.set_gpr(4, rsp);
        core.set_rip(rip);
    } else {
        flat_entry(core, base.wrapping_add(16) | 3, base.wrapping_add(24) | 3, CODE32, 3);
        core.set_gpr(4, rsp & 0xffff_ffff);
        core.set_rip(rip & 0xffff_ffff);
    }
    Ok(())
}
