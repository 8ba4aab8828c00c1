//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, with and without REP.
//!
//! Spans of plain RAM are done by the host processor's own string instructions, so overlap, counts and flags are
//! its; everything else goes element by element. A call does a bounded piece of a repetition and leaves RIP at the
//! instruction when more is to be done, so that interrupts come in between with exact registers.
//! Source: Intel SDM vol. 2B, REP; vol. 1, 7.3.9.
#![allow(unsafe_code)]

#[cfg(test)]
mod tests;

use core::arch::asm;
use std::sync::atomic::Ordering;

use iced_x86::{Code, Instruction, OpKind};
use wardian_cpu::bits::rflags::{DF, TF, ZF};

use super::advance;
use super::legacy::operand::{RAX, RCX, RDI, RSI, compare, load, probe, set_sized, store};
use crate::access::{segment_number, size_mask};
use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
}

impl Op {
    fn reads_source(self) -> bool {
        matches!(self, Op::Movs | Op::Lods | Op::Cmps)
    }
    fn uses_destination(self) -> bool {
        self != Op::Lods
    }
    fn writes(self) -> bool {
        matches!(self, Op::Movs | Op::Stos)
    }
    fn compares(self) -> bool {
        matches!(self, Op::Scas | Op::Cmps)
    }
}

fn decode(code: Code) -> Option<(Op, usize)> {
    Some(match code {
        Code::Movsb_m8_m8 => (Op::Movs, 1),
        Code::Movsw_m16_m16 => (Op::Movs, 2),
        Code::Movsd_m32_m32 => (Op::Movs, 4),
        Code::Movsq_m64_m64 => (Op::Movs, 8),
        Code::Stosb_m8_AL => (Op::Stos, 1),
        Code::Stosw_m16_AX => (Op::Stos, 2),
        Code::Stosd_m32_EAX => (Op::Stos, 4),
        Code::Stosq_m64_RAX => (Op::Stos, 8),
        Code::Lodsb_AL_m8 => (Op::Lods, 1),
        Code::Lodsw_AX_m16 => (Op::Lods, 2),
        Code::Lodsd_EAX_m32 => (Op::Lods, 4),
        Code::Lodsq_RAX_m64 => (Op::Lods, 8),
        Code::Scasb_AL_m8 => (Op::Scas, 1),
        Code::Scasw_AX_m16 => (Op::Scas, 2),
        Code::Scasd_EAX_m32 => (Op::Scas, 4),
        Code::Scasq_RAX_m64 => (Op::Scas, 8),
        Code::Cmpsb_m8_m8 => (Op::Cmps, 1),
        Code::Cmpsw_m16_m16 => (Op::Cmps, 2),
        Code::Cmpsd_m32_m32 => (Op::Cmps, 4),
        Code::Cmpsq_m64_m64 => (Op::Cmps, 8),
        _ => return None,
    })
}

/// Address size in bytes of a string instruction (INS and OUTS too).
pub(super) fn address_bytes(insn: &Instruction) -> usize {
    (0..insn.op_count())
        .find_map(|n| match insn.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        })
        .unwrap_or(8)
}

/// Adds `count` elements of `size` bytes to an index register, in the direction of DF.
pub(super) fn move_index(core: &mut Core, number: usize, address: usize, size: usize, count: u64) {
    let bytes = count.wrapping_mul(size as u64);
    let old = core.gpr(number);
    let new = if core.rflags() & DF != 0 { old.wrapping_sub(bytes) } else { old.wrapping_add(bytes) };
    set_sized(core, number, address, new);
}

/// Whether the iteration just done must be seen by the run loop before the next: something for the machine, an
/// answer used up, a data breakpoint, single step, an interrupt.
pub(super) fn pause(core: &Core) -> bool {
    !core.out.is_empty()
        || core.journal_used > 0
        || core.watch_hit != 0
        || core.rflags() & TF != 0
        || core.c().attention.load(Ordering::Relaxed) != 0
}

/// Iterations (pieces of pages, or elements) of one call.
const PIECES: u32 = 32;
const ELEMENTS: u32 = 512;

struct Plan {
    op: Op,
    /// Element size in bytes.
    size: usize,
    /// Address size in bytes.
    address: usize,
    /// Segment of the source.
    source: usize,
    down: bool,
    /// ZF with which REPE or REPNE goes on.
    goes_on: Option<bool>,
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let (op, size) = decode(insn.code())?;
    Some(run(core, insn, op, size))
}

fn run(core: &mut Core, insn: &Instruction, op: Op, size: usize) -> Result<()> {
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    let plan = Plan {
        op,
        size,
        address: address_bytes(insn),
        source: segment_number(insn.memory_segment()),
        down: core.rflags() & DF != 0,
        goes_on: (repeated && op.compares()).then(|| !insn.has_repne_prefix()),
    };
    if !repeated {
        element(core, &plan)?;
        advance(core, insn);
        return Ok(());
    }
    let mask = size_mask(plan.address);
    let mut work = 0;
    loop {
        let left = core.gpr(RCX) & mask;
        if left == 0 {
            if work == 0 {
                no_iteration(core, &plan);
            }
            advance(core, insn);
            return Ok(());
        }
        let single = core.rflags() & TF != 0;
        let (done, on) = match if single { None } else { piece(core, &plan, left) } {
            Some((done, on)) => {
                work += ELEMENTS / PIECES;
                (done, on)
            }
            None => {
                work += 1;
                (1, element(core, &plan)?)
            }
        };
        set_sized(core, RCX, plan.address, left.wrapping_sub(done));
        if !on {
            advance(core, insn);
            return Ok(());
        }
        if work >= ELEMENTS || pause(core) {
            if left == done {
                advance(core, insn);
            }
            return Ok(());
        }
    }
}

/// A zero count with 32-bit addresses in 64-bit mode: processors of Intel's design still zero-extend the registers
/// of MOVS and STOS.
fn no_iteration(core: &mut Core, plan: &Plan) {
    if plan.address != 4 || !core.is_64bit() || core.model.vendor().is_amd_like() {
        return;
    }
    core.set_gpr(RCX, 0);
    let registers: &[usize] = match plan.op {
        Op::Movs => &[RSI, RDI],
        Op::Stos => &[RDI],
        _ => &[],
    };
    for number in registers {
        let value = core.gpr(*number);
        set_sized(core, *number, 4, value);
    }
}

/// One element, registers advanced but the count. Says whether a repetition goes on after it.
fn element(core: &mut Core, plan: &Plan) -> Result<bool> {
    let (op, size, mask) = (plan.op, plan.size, size_mask(plan.address));
    let (from, to) = (core.gpr(RSI) & mask, core.gpr(RDI) & mask);
    let source = if op.reads_source() { core.linear(plan.source, from, size, false)? } else { 0 };
    let destination = if op.uses_destination() { core.linear(seg::ES, to, size, op.writes())? } else { 0 };
    let mut on = true;
    match op {
        Op::Movs => {
            let value = match load(core, source, size) {
                // A device must not be asked in vain.
                Err(Trap::Exit(exit)) => {
                    probe(core, destination, size)?;
                    return Err(Trap::Exit(exit));
                }
                other => other?,
            };
            store(core, destination, size, value)?;
        }
        Op::Stos => {
            let value = core.gpr(RAX);
            store(core, destination, size, value)?;
        }
        Op::Lods => {
            let value = load(core, source, size)?;
            set_sized(core, RAX, size, value);
        }
        Op::Scas | Op::Cmps => {
            let first = if op == Op::Cmps { load(core, source, size)? } else { core.gpr(RAX) };
            let second = load(core, destination, size)?;
            let flags = compare(size, first, second, core.rflags());
            core.set_rflags(flags);
            on = plan.goes_on.is_none_or(|zero| (flags & ZF != 0) == zero);
        }
    }
    advance_indices(core, plan, 1);
    Ok(on)
}

fn advance_indices(core: &mut Core, plan: &Plan, count: u64) {
    if plan.op.reads_source() {
        move_index(core, RSI, plan.address, plan.size, count);
    }
    if plan.op.uses_destination() {
        move_index(core, RDI, plan.address, plan.size, count);
    }
}

/// How many elements from `offset` (at `linear`) on lie in one page and do not wrap the offset.
fn reach(plan: &Plan, offset: u64, linear: u64) -> u64 {
    let size = plan.size as u64;
    let in_page = linear & 0xfff;
    if plan.down {
        if in_page + size > 4096 { 0 } else { (in_page / size + 1).min(offset / size + 1) }
    } else {
        ((4096 - in_page) / size).min((size_mask(plan.address) - offset) / size)
    }
}

/// Host address of the element at `offset`, if `count` elements from it on are plain RAM.
fn span(
    core: &mut Core,
    plan: &Plan,
    segment: usize,
    offset: u64,
    count: u64,
    write: bool,
) -> Option<*mut u8> {
    let len = count as usize * plan.size;
    let back = if plan.down { len - plan.size } else { 0 };
    let linear = core.linear(segment, offset.wrapping_sub(back as u64), len, write).ok()?;
    if core.alignment_checked() && !linear.is_multiple_of(plan.size as u64) {
        return None;
    }
    // A fault is found again, with its exact address, by the element.
    let host = core.host_span(linear, len, write, Privilege::Current).ok()??;
    Some(host.wrapping_add(back))
}

/// Up to a page of elements in plain RAM, registers advanced but the count: how many, and whether the repetition
/// goes on. `None`: the next element is not for this way.
fn piece(core: &mut Core, plan: &Plan, left: u64) -> Option<(u64, bool)> {
    let (op, mask) = (plan.op, size_mask(plan.address));
    let (from, to) = (core.gpr(RSI) & mask, core.gpr(RDI) & mask);
    let mut count = left;
    if op.reads_source() {
        let linear = core.linear(plan.source, from, plan.size, false).ok()?;
        count = count.min(reach(plan, from, linear));
    }
    if op.uses_destination() {
        let linear = core.linear(seg::ES, to, plan.size, op.writes()).ok()?;
        count = count.min(reach(plan, to, linear));
    }
    if count == 0 {
        return None;
    }
    let null = std::ptr::null_mut();
    let source = if op.reads_source() { span(core, plan, plan.source, from, count, false)? } else { null };
    let destination =
        if op.uses_destination() { span(core, plan, seg::ES, to, count, op.writes())? } else { null };
    let mut done = count;
    let mut on = true;
    match op {
        Op::Movs => copy(plan, source, destination, count),
        Op::Stos => fill(plan, destination, count, core.gpr(RAX)),
        Op::Lods => {
            let last = (count as usize - 1) * plan.size;
            let at = if plan.down { source.wrapping_sub(last) } else { source.wrapping_add(last) };
            let mut bytes = [0u8; 8];
            // SAFETY: `span` says that all `count` elements are live RAM of one page.
            unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), plan.size) };
            set_sized(core, RAX, plan.size, u64::from_le_bytes(bytes));
        }
        Op::Scas | Op::Cmps => {
            let zero = plan.goes_on?;
            let (rest, flags) = scan(plan, source, destination, count, core.gpr(RAX), zero);
            done = count - rest;
            core.ctx.get_mut().flags = flags;
            on = (core.rflags() & ZF != 0) == zero;
        }
    }
    advance_indices(core, plan, done);
    Some((done, on))
}

/// Calls `$run!("letter")` for the element size, within `std` and `cld` when going down.
macro_rules! sized {
    ($plan:expr, $run:ident) => {
        match ($plan.size, $plan.down) {
            (1, false) => $run!("", "b"),
            (2, false) => $run!("", "w"),
            (4, false) => $run!("", "d"),
            (_, false) => $run!("", "q"),
            (1, true) => $run!("std", "b"),
            (2, true) => $run!("std", "w"),
            (4, true) => $run!("std", "d"),
            (_, true) => $run!("std", "q"),
        }
    };
}

fn copy(plan: &Plan, source: *mut u8, destination: *mut u8, count: u64) {
    macro_rules! go {
        ($direction:literal, $letter:literal) => {
            // SAFETY: `span` says that all `count` elements on both sides are live RAM, each side in one page.
            // Other vCPUs may write there at the same time, as on any machine; no Rust reference exists.
            unsafe {
                asm!(
                    $direction,
                    concat!("rep movs", $letter),
                    "cld",
                    inout("rsi") source => _,
                    inout("rdi") destination => _,
                    inout("rcx") count => _,
                    options(nostack),
                )
            }
        };
    }
    sized!(plan, go);
}

fn fill(plan: &Plan, destination: *mut u8, count: u64, value: u64) {
    macro_rules! go {
        ($direction:literal, $letter:literal) => {
            // SAFETY: as in `copy`, for the destination.
            unsafe {
                asm!(
                    $direction,
                    concat!("rep stos", $letter),
                    "cld",
                    in("rax") value,
                    inout("rdi") destination => _,
                    inout("rcx") count => _,
                    options(nostack),
                )
            }
        };
    }
    sized!(plan, go);
}

/// Elements left when the comparison stopped (0 when it did not), and the flags as the context keeps them.
fn scan(
    plan: &Plan,
    source: *mut u8,
    destination: *mut u8,
    count: u64,
    value: u64,
    equal: bool,
) -> (u64, u32) {
    let rest: u64;
    let mut flags = value;
    macro_rules! go {
        (@ $prefix:literal, $direction:literal, $letter:literal) => {
            // SAFETY: as in `copy`, only reads. SCAS does not touch RSI. LAHF and SETO make the context's form.
            unsafe {
                asm!(
                    $direction,
                    concat!($prefix, $letter),
                    "lahf",
                    "seto al",
                    "cld",
                    inout("rax") flags,
                    inout("rsi") source => _,
                    inout("rdi") destination => _,
                    inout("rcx") count => rest,
                    options(nostack, readonly),
                )
            }
        };
    }
    macro_rules! cmps_equal { ($d:literal, $l:literal) => { go!(@ "repe cmps", $d, $l) }; }
    macro_rules! cmps_other { ($d:literal, $l:literal) => { go!(@ "repne cmps", $d, $l) }; }
    macro_rules! scas_equal { ($d:literal, $l:literal) => { go!(@ "repe scas", $d, $l) }; }
    macro_rules! scas_other { ($d:literal, $l:literal) => { go!(@ "repne scas", $d, $l) }; }
    match (plan.op, equal) {
        (Op::Cmps, true) => sized!(plan, cmps_equal),
        (Op::Cmps, false) => sized!(plan, cmps_other),
        (_, true) => sized!(plan, scas_equal),
        (_, false) => sized!(plan, scas_other),
    }
    (rest, u32::from(flags as u16))
}
