//! Hardware task switches (Intel SDM vol. 3A, chapter 9; never in IA-32e mode).

use wardian_cpu::Segment;
use wardian_cpu::bits::{cr0, rflags};

use super::deliver::Injection;
use super::descriptor::{self, Entry, code_of, is_null, kind};
use super::stack::{self, Frame, Target};
use crate::core::{Core, Privilege, seg};
use crate::tlb::Flush;
use crate::trap::{Result, Trap};

/// What switches the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// JMP.
    Jump,
    /// CALL, or an exception or interrupt through a task gate.
    Nest,
    /// IRET with NT set.
    Return,
}

/// Where the fields of a TSS are.
struct Layout {
    size: usize,
    width: usize,
    ip: usize,
    segments: usize,
    segment_count: usize,
    ldt: usize,
}

const TSS32: Layout = Layout { size: 104, width: 4, ip: 0x20, segments: 0x48, segment_count: 6, ldt: 0x60 };
const TSS16: Layout = Layout { size: 44, width: 2, ip: 0x0e, segments: 0x22, segment_count: 4, ldt: 0x2a };

impl Layout {
    fn of(kind: u32) -> &'static Layout {
        if kind & 8 != 0 { &TSS32 } else { &TSS16 }
    }
}

fn get(bytes: &[u8], at: usize, width: usize) -> u32 {
    let low = u32::from(bytes[at]) | u32::from(bytes[at + 1]) << 8;
    if width == 4 { low | u32::from(bytes[at + 2]) << 16 | u32::from(bytes[at + 3]) << 24 } else { low }
}

fn put(bytes: &mut [u8], at: usize, width: usize, value: u32) {
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// A task gate or TSS descriptor as the target of a far JMP or CALL: the checks of vol. 2A, JMP.
pub(crate) fn through_far(
    core: &mut Core,
    selector: u16,
    entry: Entry,
    cause: Cause,
    next: u64,
) -> Result<()> {
    let rpl = (selector & 3) as u8;
    if entry.dpl() < core.cpl() || entry.dpl() < rpl {
        return Err(Trap::gp(code_of(selector)));
    }
    if entry.kind() != kind::TASK_GATE {
        if !entry.present() {
            return Err(Trap::np(code_of(selector)));
        }
        return switch(core, selector, entry, cause, next, 0);
    }
    if !entry.present() {
        return Err(Trap::np(code_of(selector)));
    }
    let tss = (entry.raw >> 16) as u16;
    let entry = available(core, tss, 0)?;
    switch(core, tss, entry, cause, next, 0)
}

/// The available TSS that a task gate names.
fn available(core: &mut Core, selector: u16, ext: u32) -> Result<Entry> {
    let fault = || Trap::gp(code_of(selector) | ext);
    if selector & 4 != 0 || is_null(selector) {
        return Err(fault());
    }
    let entry = descriptor::fetch(core, selector)?.ok_or_else(fault)?;
    if !(entry.is_system(kind::TSS) || entry.is_system(kind::TSS16)) {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::np(code_of(selector) | ext));
    }
    Ok(entry)
}

/// An exception or interrupt through a task gate.
pub(crate) fn interrupt(core: &mut Core, tss: u16, injection: &Injection, ext: u32) -> Result<()> {
    let entry = available(core, tss, ext)?;
    let wide = entry.kind() & 8 != 0;
    let old = core.rflags();
    core.set_rflags(injection.flags);
    let switched = switch(core, tss, entry, Cause::Nest, injection.rip, ext);
    if switched.is_err() && core.sys.tr.selector != tss {
        core.set_rflags(old);
    }
    switched?;
    if let Some(error) = injection.error {
        let mut frame = Frame::new(if wide { 4 } else { 2 });
        frame.push(u64::from(error));
        let (pointer, mask) = Target::current(core, ext).place(core, &frame)?;
        stack::set_pointer(core, pointer, mask);
    }
    Ok(())
}

/// IRET with NT set.
pub(crate) fn return_to_previous(core: &mut Core, next: u64) -> Result<()> {
    let tr = core.sys.tr;
    let link = core.read_u16(tr.base & 0xffff_ffff, Privilege::Supervisor)?;
    let fault = || Trap::ts(code_of(link));
    if link & 4 != 0 || is_null(link) {
        return Err(fault());
    }
    let entry = descriptor::fetch(core, link)?.ok_or_else(fault)?;
    if !(entry.is_system(kind::TSS_BUSY) || entry.is_system(kind::TSS16_BUSY)) {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::np(code_of(link)));
    }
    switch(core, link, entry, Cause::Return, next, 0)
}

/// Switches to the task of `entry`. Until the new task's registers are loaded an error leaves everything as it
/// was; a fault while its segments are loaded happens in the new task.
fn switch(core: &mut Core, selector: u16, mut entry: Entry, cause: Cause, next: u64, ext: u32) -> Result<()> {
    let new = Layout::of(entry.kind());
    if (entry.limit() as usize) < new.size - 1 {
        return Err(Trap::ts(code_of(selector) | ext));
    }
    let old_tr = core.sys.tr;
    let old = Layout::of(old_tr.kind());
    if old_tr.unusable() || (old_tr.limit as usize) < old.size - 1 {
        return Err(Trap::ts(code_of(old_tr.selector) | ext));
    }
    let new_base = entry.base();
    let old_base = old_tr.base & 0xffff_ffff;

    // Everything that can fault before the point of no return.
    let mut image = [0u8; 104];
    core.read(new_base, &mut image[..new.size], Privilege::Supervisor)?;
    core.probe_write(new_base, new.size, Privilege::Supervisor)?;
    let mut saved = [0u8; 104];
    core.read(old_base, &mut saved[..old.size], Privilege::Supervisor)?;
    let old_entry = descriptor::fetch(core, old_tr.selector)?;
    core.probe_write(old_base, old.size, Privilege::Supervisor)?;
    core.probe_write(entry.at, 8, Privilege::Supervisor)?;
    if let Some(old_entry) = old_entry {
        core.probe_write(old_entry.at, 8, Privilege::Supervisor)?;
    }

    // Busy marks and the outgoing task's registers.
    if cause != Cause::Nest
        && let Some(mut old_entry) = old_entry
    {
        descriptor::set_busy(core, &mut old_entry, false)?;
    }
    let mut flags = core.rflags() as u32;
    if cause == Cause::Return {
        flags &= !(rflags::NT as u32);
    }
    put(&mut saved, old.ip, old.width, next as u32);
    put(&mut saved, old.ip + old.width, old.width, flags);
    for n in 0..8 {
        put(&mut saved, old.ip + (2 + n) * old.width, old.width, core.gpr(n) as u32);
    }
    for n in 0..old.segment_count {
        put(&mut saved, old.segments + n * old.width, 2, u32::from(core.sys.segments[n].selector));
    }
    // From the instruction pointer to the last selector: the static fields stay untouched.
    let end = old.segments + old.segment_count * old.width;
    core.write(old_base.wrapping_add(old.ip as u64), &saved[old.ip..end], Privilege::Supervisor)?;
    if cause == Cause::Nest {
        core.write_u16(new_base, old_tr.selector, Privilege::Supervisor)?;
    }
    if cause != Cause::Return {
        descriptor::set_busy(core, &mut entry, true)?;
    }

    // The point of no return: the incoming task's registers.
    core.sys.tr = entry.segment(selector);
    core.sys.tr.rights |= 2;
    core.sys.cr0 |= cr0::TS;
    core.sys.dr7 &= !0x155;
    super::control::update_watch(core);
    if new.width == 4 && core.sys.cr0 & cr0::PG != 0 {
        core.sys.cr3 = u64::from(get(&image, 0x1c, 4));
        core.flush_tlb(Flush::NonGlobal);
    }
    let mut flags = u64::from(get(&image, new.ip + new.width, new.width));
    flags = (flags & 0x0037_7fd5) | rflags::FIXED;
    if new.width == 2 {
        flags &= 0xffff;
    }
    if cause == Cause::Nest {
        flags |= rflags::NT;
    }
    for n in 0..8 {
        core.set_gpr(n, u64::from(get(&image, new.ip + (2 + n) * new.width, new.width)));
    }
    core.set_rflags(flags);
    let ip = u64::from(get(&image, new.ip, new.width));
    load_segments(core, new, &image, ip)?;
    if new.width == 4 && image[0x64] & 1 != 0 {
        return Err(Trap::db(1 << 15));
    }
    Ok(())
}

/// Loads LDTR and the segment registers of the new task. Whatever faults, the state is the new task's.
fn load_segments(core: &mut Core, layout: &Layout, image: &[u8; 104], ip: u64) -> Result<()> {
    let mut selectors = [0u16; 6];
    for (n, selector) in selectors.iter_mut().enumerate().take(layout.segment_count) {
        *selector = get(image, layout.segments + n * layout.width, 2) as u16;
    }
    let ldt = get(image, layout.ldt, 2) as u16;
    if core.v86() {
        core.set_cpl(3);
        for (n, selector) in selectors.into_iter().enumerate() {
            let segment = descriptor::real_segment(core, n, selector);
            core.set_segment(n, segment);
        }
        core.set_rip(ip & 0xffff);
        return load_ldt(core, ldt);
    }
    // Every register is invalid until loaded.
    let cpl = (selectors[seg::CS] & 3) as u8;
    for (n, selector) in selectors.into_iter().enumerate() {
        let mut segment = descriptor::null_segment(selector, cpl);
        if n == seg::CS {
            // Something to run the fault from: the handler needs only the selector and the level.
            segment = Segment { selector, base: 0, limit: u32::MAX, rights: 0xc09b | u32::from(cpl) << 5 };
        }
        core.set_segment(n, segment);
    }
    core.set_cpl(cpl);
    core.set_rip(ip);
    load_ldt(core, ldt)?;

    let selector = selectors[seg::CS];
    let fault = || Trap::ts(code_of(selector));
    if is_null(selector) {
        return Err(fault());
    }
    let entry = descriptor::fetch(core, selector)?.ok_or_else(fault)?;
    let level = if entry.is_conforming_code() { entry.dpl() <= cpl } else { entry.dpl() == cpl };
    if !entry.is_code() || !level {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::np(code_of(selector)));
    }
    let cs = descriptor::code_segment(core, entry, selector, cpl)?;
    core.set_segment(seg::CS, cs);
    core.set_rip(ip);

    let selector = selectors[seg::SS];
    let fault = || Trap::ts(code_of(selector));
    if is_null(selector) {
        return Err(fault());
    }
    let mut entry = descriptor::fetch(core, selector)?.ok_or_else(fault)?;
    if (selector & 3) as u8 != cpl || entry.dpl() != cpl || !entry.is_writable_data() {
        return Err(fault());
    }
    if !entry.present() {
        return Err(Trap::ss(code_of(selector)));
    }
    descriptor::set_accessed(core, &mut entry)?;
    core.set_segment(seg::SS, entry.segment(selector));

    for index in [seg::DS, seg::ES, seg::FS, seg::GS] {
        let selector = selectors[index];
        if is_null(selector) {
            continue;
        }
        match descriptor::load(core, index, selector) {
            // A bad selector is the TSS's fault here.
            Err(Trap::Exception(e)) if e.vector == wardian_cpu::bits::vector::GP => {
                return Err(Trap::ts(code_of(selector)));
            }
            other => other?,
        }
    }
    if ip > u64::from(core.sys.segments[seg::CS].limit) {
        return Err(Trap::gp(0));
    }
    Ok(())
}

fn load_ldt(core: &mut Core, selector: u16) -> Result<()> {
    core.sys.ldtr = descriptor::null_segment(selector, 0);
    if is_null(selector) {
        return Ok(());
    }
    let fault = || Trap::ts(code_of(selector));
    if selector & 4 != 0 {
        return Err(fault());
    }
    let entry = descriptor::fetch(core, selector)?.ok_or_else(fault)?;
    if !entry.is_system(kind::LDT) || !entry.present() {
        return Err(fault());
    }
    core.sys.ldtr = entry.segment(selector);
    Ok(())
}
