//! Delivery of exceptions and interrupts through the IDT (Intel SDM vol. 3A, chapter 7; vol. 2A, INT n).

use wardian_cpu::bits::{rflags, vector};
use wardian_cpu::{Activity, Segment};

use super::descriptor::{self, Entry, code_of, is_null, kind};
use super::stack::{self, Frame, Target};
use super::{canonical, task};
use crate::core::{Core, Privilege, seg};
use crate::trap::{Exception, Result, Trap};

/// Flags that every gate clears in the handler.
const ENTRY_CLEARED: u64 = rflags::TF | rflags::NT | rflags::RF | rflags::VM;

/// What interrupts the guest at `core.rip()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// An exception.
    Exception(Exception),
    /// A maskable interrupt, already acknowledged.
    External(u8),
    /// A non-maskable interrupt.
    Nmi,
}

/// No handler could be reached: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

/// One way through the IDT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Injection {
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub error: Option<u32>,
    /// INT n, INT3 or INTO: the gate's DPL counts, and nested faults do not say "external".
    pub software: bool,
    /// RIP to push.
    pub rip: u64,
    /// RFLAGS to push.
    pub flags: u64,
}

/// Classes of exceptions for double faults (Intel SDM vol. 3A, table 7-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Handled one after the other.
    Benign,
    /// Divide error and the segment faults.
    Contributory,
    /// Page faults.
    Page,
    /// Double fault.
    Double,
}

/// The class of exception `vector`.
pub(crate) fn class(vector: u8) -> Class {
    match vector {
        vector::DF => Class::Double,
        vector::PF => Class::Page,
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        _ => Class::Benign,
    }
}

/// What follows when `second` happens while an event of class `first` is delivered (Intel SDM vol. 3A, table
/// 7-5); `None` is a triple fault.
pub(crate) fn combine(first: Class, second: Exception) -> Option<Exception> {
    let double = Exception { vector: vector::DF, error: Some(0), payload: 0 };
    match (first, class(second.vector)) {
        (Class::Double, Class::Contributory | Class::Page | Class::Double) => None,
        (Class::Contributory, Class::Contributory) | (Class::Page, Class::Contributory | Class::Page) => {
            Some(double)
        }
        _ => Some(second),
    }
}

/// Delivers `event`, and whatever goes wrong while it is delivered.
///
/// `core.rip()` is what the handler returns to: the faulting instruction, or the next one for traps and
/// interrupts.
///
/// # Errors
/// [`TripleFault`]: nothing was delivered.
pub(crate) fn deliver(core: &mut Core, event: Event) -> std::result::Result<(), TripleFault> {
    let mut injection = first(core, event);
    let mut class_now = match event {
        Event::Exception(e) => class(e.vector),
        _ => Class::Benign,
    };
    // Each round either ends or moves towards a triple fault; benign exceptions can follow each other only by
    // alternating with others (an #AC or #DB while pushing a frame), so a bound ends every chain.
    for _ in 0..16 {
        core.journal.clear();
        core.journal_used = 0;
        match through_idt(core, &injection) {
            Ok(()) => {
                if event == Event::Nmi {
                    core.sys.nmi_blocked = true;
                }
                core.sys.interrupt_shadow = false;
                core.sys.activity = Activity::Running;
                return Ok(());
            }
            Err(Trap::Exception(second)) => {
                let next = combine(class_now, second).ok_or(TripleFault)?;
                record(core, &second);
                class_now = class(next.vector);
                injection = of_exception(core, next);
            }
            // A descriptor or stack in device memory cannot be served in the middle of a delivery.
            Err(Trap::Exit(exit)) => {
                tracing::warn!(?exit, "The guest's IDT, GDT, TSS or stack is not in RAM");
                return Err(TripleFault);
            }
            // (Nothing in a delivery asks to be alone.)
            Err(Trap::Alone | Trap::TripleFault) => return Err(TripleFault),
        }
    }
    Err(TripleFault)
}

fn first(core: &mut Core, event: Event) -> Injection {
    match event {
        Event::Exception(e) => {
            record(core, &e);
            of_exception(core, e)
        }
        Event::External(vector) => at_boundary(core, vector),
        Event::Nmi => at_boundary(core, vector::NMI),
    }
}

fn at_boundary(core: &Core, vector: u8) -> Injection {
    let flags = core.rflags() & !rflags::RF;
    Injection { vector, error: None, software: false, rip: core.rip(), flags }
}

/// CR2, DR6 and DR7 as the exception leaves them.
fn record(core: &mut Core, e: &Exception) {
    match e.vector {
        vector::PF => core.sys.cr2 = e.payload,
        vector::DB => {
            core.sys.dr6 = (core.sys.dr6 & !0xf) | (e.payload & 0xe00f) | 0xffff_0ff0;
            core.sys.dr7 &= !(1 << 13);
            core.sys.debugctl &= !3;
        }
        _ => {}
    }
}

fn of_exception(core: &Core, e: Exception) -> Injection {
    // Faults push RF so that the instruction does not hit its breakpoint again; an instruction breakpoint and
    // the traps push it clear (Intel SDM vol. 3B, 19.3.1.1).
    let rf = match e.vector {
        vector::DB | vector::BP | vector::OF | vector::DF | vector::MC => 0,
        _ => rflags::RF,
    };
    Injection {
        vector: e.vector,
        error: e.error,
        software: false,
        rip: core.rip(),
        flags: (core.rflags() & !rflags::RF) | rf,
    }
}

/// INT n, INT3, INTO (`gated`) and INT1, with the return address `next`.
///
/// # Errors
/// The exception that stopped it.
pub(crate) fn software(core: &mut Core, vector: u8, next: u64, gated: bool) -> Result<()> {
    let flags = core.rflags() & !rflags::RF;
    through_idt(core, &Injection { vector, error: None, software: gated, rip: next, flags })?;
    core.sys.interrupt_shadow = false;
    Ok(())
}

fn through_idt(core: &mut Core, injection: &Injection) -> Result<()> {
    if !core.protected() {
        real(core, injection)
    } else if core.long_mode() {
        long(core, injection)
    } else {
        protected(core, injection)
    }
}

/// Real mode: the interrupt vector table (Intel SDM vol. 3B, 22.1.4).
fn real(core: &mut Core, injection: &Injection) -> Result<()> {
    let offset = u64::from(injection.vector) * 4;
    if offset + 3 > u64::from(core.sys.idtr.limit) {
        return Err(Trap::gp(0));
    }
    let at = core.sys.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let entry = core.read_u32(at, Privilege::Supervisor)?;
    let mut frame = Frame::new(2);
    frame.push(injection.flags);
    frame.push(u64::from(core.sys.segments[seg::CS].selector));
    frame.push(injection.rip);
    let (pointer, mask) = Target::current(core, 0).place(core, &frame)?;
    stack::set_pointer(core, pointer, mask);
    let cs = descriptor::real_segment(core, seg::CS, (entry >> 16) as u16);
    core.set_segment(seg::CS, cs);
    core.set_rip(u64::from(entry & 0xffff));
    let flags = core.rflags();
    core.set_rflags(flags & !(rflags::IF | rflags::TF | rflags::RF | rflags::AC));
    Ok(())
}

/// The stack for a change to privilege level `level` from a 16- or 32-bit TSS.
pub(crate) fn inner_stack(core: &mut Core, level: u8, ext: u32) -> Result<(Segment, u64)> {
    let tr = core.sys.tr;
    let wide = tr.kind() & 8 != 0;
    let size = if wide { 8 } else { 4 };
    let offset = u32::from(level) * size + size / 2;
    if tr.unusable() || offset + size - 1 > tr.limit {
        return Err(Trap::ts(code_of(tr.selector) | ext));
    }
    let at = tr.base.wrapping_add(u64::from(offset)) & 0xffff_ffff;
    let (pointer, selector) = if wide {
        let pointer = u64::from(core.read_u32(at, Privilege::Supervisor)?);
        (pointer, core.read_u16(at.wrapping_add(4) & 0xffff_ffff, Privilege::Supervisor)?)
    } else {
        let both = core.read_u32(at, Privilege::Supervisor)?;
        (u64::from(both & 0xffff), (both >> 16) as u16)
    };
    if is_null(selector) {
        return Err(Trap::ts(ext));
    }
    let code = code_of(selector) | ext;
    let mut entry = descriptor::fetch(core, selector)?.ok_or_else(|| Trap::ts(code))?;
    if (selector & 3) as u8 != level || entry.dpl() != level || !entry.is_writable_data() {
        return Err(Trap::ts(code));
    }
    if !entry.present() {
        return Err(Trap::ss(code));
    }
    descriptor::set_accessed(core, &mut entry)?;
    Ok((entry.segment(selector), pointer))
}

/// RSP for privilege level `level`, or of interrupt stack `ist` (1-7), from a 64-bit TSS.
pub(crate) fn inner_pointer(core: &mut Core, level: u8, ist: u8, ext: u32) -> Result<u64> {
    let tr = core.sys.tr;
    let offset = if ist > 0 { 0x1c + u32::from(ist) * 8 } else { 4 + u32::from(level) * 8 };
    if tr.unusable() || offset + 7 > tr.limit {
        return Err(Trap::ts(code_of(tr.selector) | ext));
    }
    core.read_u64(tr.base.wrapping_add(u64::from(offset)), Privilege::Supervisor)
}

/// The target code segment of a gate.
fn gate_code(core: &mut Core, selector: u16, ext: u32, long: bool) -> Result<Entry> {
    if is_null(selector) {
        return Err(Trap::gp(ext));
    }
    let code = code_of(selector) | ext;
    let entry = descriptor::fetch(core, selector)?.ok_or_else(|| Trap::gp(code))?;
    if !entry.is_code() || entry.dpl() > core.cpl() || (long && (!entry.long() || entry.big())) {
        return Err(Trap::gp(code));
    }
    if !entry.present() {
        return Err(Trap::np(code));
    }
    Ok(entry)
}

/// Checks that are common to all gates: gate DPL for software interrupts, presence.
fn check_gate(core: &Core, gate: Entry, injection: &Injection, code: u32) -> Result<()> {
    if injection.software && gate.dpl() < core.cpl() {
        return Err(Trap::gp(code));
    }
    if gate.present() { Ok(()) } else { Err(Trap::np(code)) }
}

fn flags_after(core: &Core, interrupt_gate: bool) -> u64 {
    let cleared = if interrupt_gate { ENTRY_CLEARED | rflags::IF } else { ENTRY_CLEARED };
    core.rflags() & !cleared
}

/// Protected mode outside IA-32e mode.
fn protected(core: &mut Core, injection: &Injection) -> Result<()> {
    let ext = u32::from(!injection.software);
    let offset = u32::from(injection.vector) * 8;
    let code = offset | 2 | ext;
    if offset + 7 > u32::from(core.sys.idtr.limit) {
        return Err(Trap::gp(code));
    }
    let at = core.sys.idtr.base.wrapping_add(u64::from(offset)) & 0xffff_ffff;
    let gate = Entry { raw: core.read_u64(at, Privilege::Supervisor)?, at };
    let known = !gate.is_code_or_data()
        && matches!(gate.kind(), kind::TASK_GATE | kind::INT16 | kind::TRAP16 | kind::INT | kind::TRAP);
    if !known {
        return Err(Trap::gp(code));
    }
    check_gate(core, gate, injection, code)?;
    let selector = (gate.raw >> 16) as u16;
    if gate.kind() == kind::TASK_GATE {
        return task::interrupt(core, selector, injection, ext);
    }
    let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
    let entry = gate_code(core, selector, ext, false)?;
    let code = code_of(selector) | ext;
    let v86 = core.v86();
    let inner = !entry.is_conforming_code() && entry.dpl() < core.cpl();
    if v86 && !(inner && entry.dpl() == 0) {
        return Err(Trap::gp(code));
    }
    let level = if inner { entry.dpl() } else { core.cpl() };
    let target =
        if size == 4 { (gate.raw & 0xffff) | (gate.raw >> 32 & 0xffff_0000) } else { gate.raw & 0xffff };

    let mut frame = Frame::new(size);
    let mut stack = Target::current(core, ext);
    let mut new_ss = None;
    if inner {
        let (ss, pointer) = inner_stack(core, level, ext)?;
        let error = code_of(ss.selector) | ext;
        stack = Target { segment: Some(ss), pointer, privilege: Privilege::Supervisor, error };
        new_ss = Some(ss);
        if v86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(u64::from(core.sys.segments[index].selector));
            }
        }
        frame.push(u64::from(core.sys.segments[seg::SS].selector));
        frame.push(core.gpr(4));
    }
    frame.push(injection.flags);
    frame.push(u64::from(core.sys.segments[seg::CS].selector));
    frame.push(injection.rip);
    if let Some(error) = injection.error {
        frame.push(u64::from(error));
    }
    if target > u64::from(entry.limit()) {
        return Err(Trap::gp(ext));
    }
    let cs = descriptor::code_segment(core, entry, selector, level)?;
    let (pointer, mask) = stack.place(core, &frame)?;

    let flags = flags_after(core, gate.kind() & 1 == 0);
    core.set_rflags(flags);
    if let Some(ss) = new_ss {
        core.set_segment(seg::SS, ss);
        core.set_cpl(level);
    }
    if v86 {
        for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
            core.set_segment(index, descriptor::null_segment(0, 0));
        }
    }
    stack::set_pointer(core, pointer, mask);
    core.set_segment(seg::CS, cs);
    core.set_rip(target);
    Ok(())
}

/// IA-32e mode (Intel SDM vol. 3A, 7.14).
fn long(core: &mut Core, injection: &Injection) -> Result<()> {
    let ext = u32::from(!injection.software);
    let offset = u32::from(injection.vector) * 16;
    let code = (u32::from(injection.vector) * 8) | 2 | ext;
    if offset + 15 > u32::from(core.sys.idtr.limit) {
        return Err(Trap::gp(code));
    }
    let at = core.sys.idtr.base.wrapping_add(u64::from(offset));
    let mut bytes = [0u8; 16];
    core.read(at, &mut bytes, Privilege::Supervisor)?;
    let both = u128::from_le_bytes(bytes);
    let gate = Entry { raw: both as u64, at };
    if gate.is_code_or_data() || !matches!(gate.kind(), kind::INT | kind::TRAP) || both >> 104 & 0x1f != 0 {
        return Err(Trap::gp(code));
    }
    check_gate(core, gate, injection, code)?;
    let selector = (gate.raw >> 16) as u16;
    let entry = gate_code(core, selector, ext, true)?;
    let inner = !entry.is_conforming_code() && entry.dpl() < core.cpl();
    let level = if inner { entry.dpl() } else { core.cpl() };
    let ist = (gate.raw >> 32) as u8 & 7;
    let pointer = if ist > 0 || inner {
        inner_pointer(core, level, ist, ext)?
    } else {
        core.gpr(4) & stack::mask(core)
    };
    let target = (gate.raw & 0xffff) | (gate.raw >> 32 & 0xffff_0000) | ((both >> 64) as u64) << 32;
    if !canonical(target) {
        return Err(Trap::gp(ext));
    }

    let mut frame = Frame::new(8);
    frame.push(u64::from(core.sys.segments[seg::SS].selector));
    frame.push(core.gpr(4) & stack_read_mask(core));
    frame.push(injection.flags);
    frame.push(u64::from(core.sys.segments[seg::CS].selector));
    frame.push(injection.rip);
    if let Some(error) = injection.error {
        frame.push(u64::from(error));
    }
    let privilege = if inner { Privilege::Supervisor } else { Privilege::Current };
    let cs = descriptor::code_segment(core, entry, selector, level)?;
    let stack = Target { segment: None, pointer: pointer & !15, privilege, error: ext };
    let (pointer, mask) = stack.place(core, &frame)?;

    let flags = flags_after(core, gate.kind() == kind::INT);
    core.set_rflags(flags);
    if inner {
        core.set_segment(seg::SS, descriptor::null_segment(u16::from(level), level));
        core.set_cpl(level);
    }
    core.set_segment(seg::CS, cs);
    stack::set_pointer(core, pointer, mask);
    core.set_rip(target);
    Ok(())
}

/// In compatibility mode the upper half of RSP does not exist.
fn stack_read_mask(core: &Core) -> u64 {
    if core.is_64bit() { u64::MAX } else { 0xffff_ffff }
}
