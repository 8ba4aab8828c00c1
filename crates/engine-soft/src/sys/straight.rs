//! The straight way of an instruction that translated code does not run itself: decoded when its block was
//! translated, run by a call out of translated code, which goes on by the jump cache.
//!
//! Whatever the run loop must see (an exception, a question to the machine, an interrupt shadow or a held interrupt, single step, a halt)
//! leaves to it as if the instruction had been the block's end.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use wardian_cpu::Activity;
use wardian_cpu::bits::rflags;

use super::{Event, Handler, canonical, deliver, handler};
use crate::bases::{self, Base};
use crate::core::Core;
use crate::ctx::{self, Ctx, Leave};
use crate::mode::Mode;
use crate::trap::Trap;

/// Most instructions that are kept; then all translations are forgotten.
const MOST: usize = 1 << 17;

/// An instruction, ready to be run.
#[derive(Clone, Copy)]
struct Ready {
    insn: Instruction,
    run: Handler,
    /// Where it was translated.
    linear: u64,
    /// Base of its page, if its block floats.
    base: Base,
    /// Its block starts with it: the attention word was just looked at, or is meant to be passed over.
    first: bool,
    count: u32,
}

/// The instructions of one vCPU's blocks that are run straight.
#[derive(Default)]
pub(crate) struct Straight {
    ready: Vec<Ready>,
    /// How often those were run that are forgotten already.
    past: Vec<u64>,
}

impl Straight {
    /// Keeps `insn` at linear address `linear`, and gives its number.
    pub(crate) fn add(&mut self, insn: Instruction, linear: u64, base: Base, first: bool) -> u32 {
        self.ready.push(Ready { insn, run: handler(&insn), linear, base, first, count: 0 });
        self.ready.len() as u32 - 1
    }

    /// Whether there is room for those of another block (which has one at most).
    pub(crate) fn has_room(&self) -> bool {
        self.ready.len() < MOST
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        let mut past = std::mem::take(&mut self.past);
        self.tally(&mut past);
        self.past = past;
        self.ready.clear();
    }

    fn tally(&self, counts: &mut Vec<u64>) {
        for ready in &self.ready {
            let place = ready.insn.mnemonic() as usize;
            if counts.len() <= place {
                counts.resize(place + 1, 0);
            }
            counts[place] += u64::from(ready.count);
        }
    }

    /// How often instructions were run, by name; the most frequent first.
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        static NAMES: OnceLock<Vec<String>> = OnceLock::new();
        let names = NAMES.get_or_init(|| Mnemonic::values().map(|m| format!("run_{m:?}")).collect());
        let mut counts = self.past.clone();
        self.tally(&mut counts);
        let mut found: Vec<(&'static str, u64)> =
            names.iter().map(String::as_str).zip(counts).filter(|(_, count)| *count > 0).collect();
        found.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        found
    }
}

/// Runs instruction `number`. Returns where translated code goes on, or 0 to leave it as the context says.
pub(crate) extern "C" fn helper(ctx: *mut Ctx, number: u32) -> u64 {
    // SAFETY: translated code runs only inside the run loop, which put the core's address there and does not touch the
    // core until translated code has left.
    let core = unsafe { &mut *((*ctx).core as *mut Core) };
    match core.run_straight(number) {
        Ok(code) => code,
        Err(leave) => {
            core.ctx.get_mut().leave = leave as u32;
            0
        }
    }
}

/// The same instruction, `by` further on.
fn relocate(insn: &mut Instruction, by: u64) {
    insn.set_ip(insn.ip().wrapping_add(by));
    if insn.is_ip_rel_memory_operand() {
        let at = insn.memory_displacement64().wrapping_add(by);
        let narrow = insn.memory_base() == Register::EIP;
        insn.set_memory_displacement64(if narrow { at & 0xffff_ffff } else { at });
    }
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.set_near_branch64(insn.near_branch64().wrapping_add(by)),
        OpKind::NearBranch32 => insn.set_near_branch32(insn.near_branch32().wrapping_add(by as u32)),
        OpKind::NearBranch16 => insn.set_near_branch16(insn.near_branch16().wrapping_add(by as u16)),
        _ => {}
    }
}

impl Core {
    fn run_straight(&mut self, number: u32) -> Result<u64, Leave> {
        // (A number that does not exist would be a bug of the translator.)
        let ready = self.straight.ready.get_mut(number as usize).ok_or(Leave::Attention)?;
        let (mut insn, run, linear) = (ready.insn, ready.run, ready.linear);
        let rip = bases::settled(&self.ctx, ready.base, linear);
        if rip != linear {
            relocate(&mut insn, rip.wrapping_sub(linear));
        }
        self.ctx.get_mut().rip = rip;
        if !ready.first && self.ctx.get().attention.load(Ordering::Acquire) != 0 {
            // Interrupts right behind an STI must not be hidden for ever by a CLI.
            return Err(Leave::Attention);
        }
        ready.count = ready.count.wrapping_add(1);
        self.counters.interpreted += 1;
        self.journal_used = 0;
        if let Err(trap) = run(self, &insn) {
            return self.deliver_straight(trap);
        }
        if !self.journal.is_empty() {
            self.journal.clear();
            self.journal_fault = false;
        }
        let odd = self.sys.interrupt_shadow
            || self.watch_hit != 0
            || !self.out.is_empty()
            || self.sys.activity != Activity::Running
            || self.alone
            || self.c().held != 0
            || self.c().rflags & (rflags::TF | rflags::RF) != 0;
        if odd {
            return Err(Leave::Completed);
        }
        self.onward().ok_or(Leave::Completed)
    }

    /// Delivers what stopped the instruction at RIP, if it is an exception and nothing else is to be seen by the run
    /// loop. Gives where translated code goes on, or says how it is to be left.
    pub(crate) fn deliver_straight(&mut self, trap: Trap) -> Result<u64, Leave> {
        let plain = !self.is_counted()
            && !self.mode().single()
            && self.watch.is_empty()
            && !self.alone
            && self.undo.is_none()
            && self.journal.is_empty()
            && self.out.is_empty()
            && self.c().held == 0
            && self.c().rflags & rflags::TF == 0
            && self.c().attention.load(Ordering::Acquire) == 0;
        let exception = match trap {
            Trap::Exception(exception) if plain => exception,
            trap => {
                self.trap = Some(trap);
                return Err(Leave::Trap);
            }
        };
        self.counters.exceptions += 1;
        if deliver(self, Event::Exception(exception)).is_err() {
            self.trap = Some(Trap::TripleFault);
            return Err(Leave::Trap);
        }
        self.onward().ok_or(Leave::Completed)
    }

    /// Where code for RIP is found by the jump cache (which may lead to the run loop); `None` where the run loop has to
    /// look at the mode first.
    fn onward(&mut self) -> Option<u64> {
        if self.mode_dirty {
            let mode = Mode::of(self, false);
            if self.view_mode[mode.view() as usize] != mode || self.stops_dirty {
                return None;
            }
            self.ctx.get_mut().mode = mode;
            self.mode_dirty = false;
        }
        let rip = self.c().rip;
        if self.mode().code64() && !canonical(rip) {
            return None;
        }
        Some(self.ctx.load(ctx::jumps(self.mode().view()), ctx::jump_slot(rip)))
    }
}
