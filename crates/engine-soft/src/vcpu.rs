//! [`SoftVcpu`]: the run loop. Enter translated code, see why it left, do what it asks, enter again.

pub mod check;
pub mod cold;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use wardian_cpu::bits::rflags;
use wardian_cpu::{
    Activity, Answer, CpuModel, CpuState, DebugEvent, DebugRequest, EngineError, Exit, Glance, OnTaken,
    Taken, Vcpu,
};
use wardian_irq::{Kick, LocalInterrupts};
use wardian_memory::GuestMemory;
use wardian_time::{Nanos, RunDelay, TimeBase, host_ticks, ticks_to_nanos};

use crate::bases;
use crate::blocks::{BlockId, FLOATING};
use crate::core::Core;
use crate::ctx::{LEAVES, Leave};
use crate::decode::{Class, CodeTable};
use crate::mode::Mode;
use crate::shared::{KICKED, Mailbox, RECHECK, REQUESTS, Request, STOP, Shared};
use crate::signals::{self, Running};
use crate::sys::{self, Event};
use crate::tlb::Jump;
use crate::translate::{Translator, gated, treatment};
use crate::trap::{Result, Trap};
use crate::{fpu, state};

/// How often the paravirtual clock pages are refreshed at most.
const REFRESH: Nanos = Nanos(10_000_000);

/// A vCPU that took no interrupt for so long, mostly because the host did not run its thread, is told that it was
/// stopped: its watchdogs would blame the guest for it.
const STARVED: Nanos = Nanos(1_500_000_000);

/// The counters of why translated code was left, by [`Leave`].
const LEFT: [&str; LEAVES] = [
    "left_chain",
    "left_lookup",
    "left_interpret",
    "left_attention",
    "left_trap",
    "left_host_fault",
    "left_completed",
    "left_budget",
    "left_edge",
];

/// A software vCPU.
pub struct SoftVcpu {
    core: Box<Core>,
    translator: Box<Translator>,
    shared: Arc<Shared>,
    mailbox: Arc<Mailbox>,
    letters: Vec<Request>,
    /// The last exit waits for an answer that the instruction will ask for again.
    asked: bool,
    kicked: bool,
    debug: DebugRequest,
    /// Addresses that no block may run into: breakpoints of the debugger and of DR0-DR3.
    stops: Vec<u64>,
    /// A breakpoint address that was reported and is to be stepped over.
    pass: Option<u64>,
    /// The rest of the budget is less than a block: one instruction at a time.
    slowly: bool,
    on_taken: Option<OnTaken>,
    /// Taken from the local APIC by the engine that ran this vCPU before, and not delivered: an interrupt, an NMI.
    interrupt_owed: Option<u8>,
    nmi_owed: bool,
    /// Each block is compared with its instructions one by one.
    check: Option<Box<check::Check>>,
    table: CodeTable,
    /// The instruction interpreted last may have loaded SS.
    loads_ss: bool,
    delay: Option<RunDelay>,
    /// Run delay that the guest has been told of.
    told: Nanos,
    refreshed: Nanos,
}

impl SoftVcpu {
    pub(crate) fn new(
        core: Box<Core>,
        translator: Box<Translator>,
        shared: Arc<Shared>,
        mailbox: Arc<Mailbox>,
    ) -> SoftVcpu {
        let counted = core.time.is_counted();
        let mut vcpu = SoftVcpu {
            core,
            translator,
            shared,
            mailbox,
            letters: Vec::new(),
            asked: false,
            kicked: false,
            debug: DebugRequest::default(),
            stops: Vec::new(),
            pass: None,
            slowly: false,
            on_taken: None,
            interrupt_owed: None,
            nmi_owed: false,
            check: None,
            table: CodeTable::new(),
            loads_ss: false,
            delay: None,
            told: Nanos(0),
            refreshed: Nanos(0),
        };
        if counted {
            vcpu.set_limit(None);
        }
        vcpu
    }

    fn single(&self) -> bool {
        self.debug.single_step
    }

    /// Whether no instruction may be begun.
    fn spent(&self) -> bool {
        self.translator.counting && self.core.c().budget <= 0
    }

    fn tell_taken(&mut self, vector: u8) {
        if let Some(told) = &mut self.on_taken {
            told(Taken { retired: self.core.retired(), rip: self.core.c().rip, vector });
        }
    }

    /// Requests of other vCPUs and of devices.
    fn serve_mailbox(&mut self) {
        let mut letters = std::mem::take(&mut self.letters);
        self.mailbox.take(&mut letters);
        for request in letters.drain(..) {
            match request {
                Request::Written { page, granules } => {
                    let killed = self.translator.invalidate(page as u32, granules);
                    self.core.counters.code_invalidations += killed as u64;
                }
                Request::Everything => {
                    self.forget_code();
                    self.core.flush_tlb(crate::tlb::Flush::All);
                    self.shared.post(Request::ForgetCode, Some(&self.mailbox));
                }
                Request::ForgetCode => self.forget_code(),
                Request::BecameCode { page } => {
                    if let Some(host) = self.core.ram_page_host(page)
                        && self.core.mmu.forbid_writes(&mut self.core.ctx, page, host)
                    {
                        let written = Request::Written { page, granules: u64::MAX };
                        self.shared.post(written, Some(&self.mailbox));
                    }
                }
            }
        }
        self.letters = letters;
    }

    /// Drops every translation.
    fn forget_code(&mut self) {
        self.core.counters.cache_flushes += 1;
        self.translator.clear();
        if let Some(check) = &mut self.check {
            check.forget();
        }
        self.core.straight.clear();
        self.core.mmu.drop_jumps(&mut self.core.ctx);
        self.core.bases.clear(&mut self.core.ctx);
    }

    fn attention(&mut self) {
        let bits = self.core.c().attention.swap(0, Ordering::AcqRel);
        if bits & REQUESTS != 0 {
            self.serve_mailbox();
        }
        self.kicked |= bits & KICKED != 0;
        if bits & STOP != 0 {
            self.shared.leave(&self.mailbox);
            self.shared.enter(&self.mailbox);
        }
    }

    /// Takes what the local APIC has for this vCPU.
    fn events(&mut self) -> std::result::Result<(), sys::deliver::TripleFault> {
        if let Some(vector) = self.interrupt_owed.take() {
            self.core.sys.activity = Activity::Running;
            return sys::deliver(&mut self.core, Event::External(vector));
        }
        if self.nmi_owed && !self.core.sys.nmi_blocked && !self.core.sys.interrupt_shadow {
            self.nmi_owed = false;
            self.core.sys.activity = Activity::Running;
            return sys::deliver(&mut self.core, Event::Nmi);
        }
        let core = &mut *self.core;
        let pending = core.irq.pending();
        core.ctx.get_mut().held = u32::from(pending.any());
        if !pending.any() {
            return Ok(());
        }
        if pending.init && core.irq.take_init() {
            if state::init(core).is_err() {
                return Err(sys::deliver::TripleFault);
            }
            core.sys.activity = if core.index == 0 { Activity::Running } else { Activity::WaitForSipi };
            core.flush_tlb(crate::tlb::Flush::All);
        }
        if core.sys.activity == Activity::WaitForSipi {
            if let Some(vector) = core.irq.take_startup() {
                let mut cs = core.sys.segments[crate::core::seg::CS];
                cs.selector = u16::from(vector) << 8;
                cs.base = u64::from(vector) << 12;
                core.set_segment(crate::core::seg::CS, cs);
                core.set_rip(0);
                core.sys.activity = Activity::Running;
            }
            return Ok(());
        }
        if core.sys.interrupt_shadow {
            return Ok(());
        }
        core.notice_stops();
        if pending.nmi && !core.sys.nmi_blocked && core.irq.take_nmi() {
            core.sys.activity = Activity::Running;
            core.counters.nmis += 1;
            self.tell_taken(2);
            return sys::deliver(&mut self.core, Event::Nmi);
        }
        if pending.interrupt
            && core.c().rflags & rflags::IF != 0
            && let Some(vector) = core.irq.acknowledge()
        {
            core.sys.activity = Activity::Running;
            core.counters.interrupts += 1;
            self.refresh_clock(false);
            self.tell_taken(vector);
            return sys::deliver(&mut self.core, Event::External(vector));
        }
        Ok(())
    }

    fn refresh_clock(&mut self, stopped: bool) {
        let now = self.core.time.now();
        if stopped || now >= self.refreshed.saturating_add(REFRESH) {
            let span = now.saturating_sub(self.refreshed);
            self.refreshed = now;
            let total = self.delay.as_ref().map_or(Nanos(0), RunDelay::read);
            let stolen = total.saturating_sub(self.told);
            self.told = total;
            let starved = span >= STARVED && stolen.0 >= span.0 / 2;
            sys::paravirt::refresh(&self.core, stolen, stopped || starved);
        }
    }

    /// The block for the current instruction.
    fn block(&mut self) -> Result<BlockId> {
        if self.core.mode_dirty {
            self.core.mode_dirty = false;
            let mode = Mode::of(&self.core, self.single() || self.slowly);
            self.core.ctx.get_mut().mode = mode;
            self.core.note_mode(mode);
            self.update_stops();
        }
        let linear = self.core.c().rip;
        let fetch = self.core.fetch_page(linear)?;
        self.core.counters.lookups += 1;
        let mode = self.core.mode();
        let key = if bases::floats(mode, linear) && self.stops.is_empty() { FLOATING } else { linear };
        if let Some(id) = self.translator.blocks.find(fetch.page as u32, (linear & 0xfff) as u16, key, mode) {
            let block = &self.translator.blocks.all[id as usize];
            match block.page2 {
                _ if block.dead => {}
                None => {
                    if block.base != 0 {
                        self.core.bases.bind(&mut self.core.ctx, block.base, linear & !0xfff);
                    }
                    return Ok(id);
                }
                Some(page) => {
                    let next = (linear | 0xfff).wrapping_add(1);
                    let second = self.core.fetch_page(next)?;
                    if second.page as u32 == page {
                        if block.base != 0 {
                            self.core.bases.bind(&mut self.core.ctx, block.base, linear & !0xfff);
                            self.core.bases.bind(&mut self.core.ctx, block.base2, next);
                        }
                        return Ok(id);
                    }
                }
            }
        }
        if !self.translator.has_room() || !self.core.straight.has_room() || !self.core.bases.has_room() {
            self.forget_code();
        }
        let begun = host_ticks();
        let made = self.translator.translate(&mut self.core, linear, mode, &self.stops);
        self.core.counters.translation_ticks += host_ticks().wrapping_sub(begun);
        made
    }

    /// Has indirect jumps to `linear` find block `id`.
    fn set_jump(&mut self, id: BlockId, linear: u64) {
        let block = &self.translator.blocks.all[id as usize];
        let (floating, crosses) = (block.base != 0, block.page2.is_some());
        let landing = self.translator.code.exec(block.landing);
        if !self.stops.is_empty() || self.check.is_some() {
            return;
        }
        let kind = if floating {
            Jump::Floating
        } else {
            let last = if crosses { (linear | 0xfff).wrapping_add(1) } else { linear };
            let mut global = |at| self.core.fetch_page(at).is_ok_and(|page| page.global);
            Jump::Fixed { global: global(linear) && global(last), crosses }
        };
        let core = &mut *self.core;
        let view = core.mode().view();
        core.counters.jump_conflicts += u64::from(core.mmu.jump_taken(&core.ctx, view, linear));
        core.mmu.set_jump(&mut core.ctx, view, linear, landing, kind);
    }

    /// Collects the breakpoints; no translation may run into a new one.
    fn update_stops(&mut self) {
        self.core.stops_dirty = false;
        let guest = (0..4).filter_map(|n| sys::control::code_breakpoint(&self.core, n));
        let unchanged =
            self.stops.iter().copied().eq(self.debug.breakpoints.iter().copied().chain(guest.clone()));
        if !unchanged {
            self.stops = self.debug.breakpoints.iter().copied().chain(guest).collect();
            self.forget_code();
        }
    }

    /// Whether a breakpoint stops the instruction at RIP.
    fn breakpoint(&mut self) -> Option<Option<Exit>> {
        let rip = self.core.c().rip;
        let resume = self.core.c().rflags & rflags::RF != 0;
        if resume {
            self.core.ctx.get_mut().rflags &= !rflags::RF;
        }
        if self.stops.is_empty() || !self.stops.contains(&rip) || self.pass == Some(rip) {
            return None;
        }
        self.pass = Some(rip);
        if self.debug.breakpoints.contains(&rip) {
            return Some(Some(Exit::Debug(DebugEvent::Breakpoint(rip))));
        }
        if resume {
            return None;
        }
        let hit = (0..4).filter(|n| sys::control::code_breakpoint(&self.core, *n) == Some(rip));
        let dr6 = hit.fold(0, |bits, n| bits | 1 << n);
        self.pass = None;
        Some(self.settle(Err(Trap::db(dr6))))
    }

    fn enter(&mut self, offset: u32) {
        let core = &mut *self.core;
        core.counters.entries += 1;
        let rbp = core.c().rbp;
        let code = self.translator.code.exec(offset);
        let enter = self.translator.code.exec(self.translator.thunks.enter);
        // SAFETY: `enter` is the thunk written by `thunks::write` with this signature; it saves every callee-saved
        // register, and declares the rest by being extern "C". Translated code touches the context, its tables and
        // guest RAM only; helpers reach the core through the context's pointer while this borrow is not used.
        unsafe {
            let enter: extern "C" fn(u64, u64) = std::mem::transmute::<u64, extern "C" fn(u64, u64)>(enter);
            enter(rbp, code);
        }
    }

    /// Decodes the instruction at RIP, whether the mode allows it or not.
    fn decode_any(&mut self) -> Result<Instruction> {
        let linear = self.core.c().rip;
        let mut bytes = [0u8; 15];
        let first = (4096 - (linear & 0xfff) as usize).min(15);
        let fetch = self.core.fetch_page(linear)?;
        read_host(fetch.host + (linear & 0xfff) as usize, &mut bytes[..first]);
        let ip = self.core.mode().ip(linear);
        let mut decoder =
            Decoder::with_ip(self.core.mode().bitness(), &bytes[..first], ip, DecoderOptions::NONE);
        let mut insn = decoder.decode();
        if insn.is_invalid() && first < 15 && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
            let next = self.core.fetch_page((linear | 0xfff).wrapping_add(1))?;
            read_host(next.host, &mut bytes[first..]);
            insn = Decoder::with_ip(self.core.mode().bitness(), &bytes, ip, DecoderOptions::NONE).decode();
        }
        if insn.is_invalid() {
            // Too long is #GP, everything else #UD.
            return Err(Trap::ud());
        }
        Ok(insn)
    }

    /// Decodes the instruction at RIP.
    fn decode(&mut self) -> Result<Instruction> {
        let insn = self.decode_any()?;
        let info = self.table.get(&insn);
        if insn.mnemonic() == iced_x86::Mnemonic::Wait && self.core.mode().wait_off() {
            return Err(Trap::nm());
        }
        if gated(info.unit, self.core.mode()) {
            return Err(if self.core.mode().fpu_off() && !self.core.mode().sse_off() {
                Trap::nm()
            } else {
                self.gate_fault(info.unit)
            });
        }
        Ok(insn)
    }

    fn gate_fault(&self, unit: crate::decode::Unit) -> Trap {
        use crate::decode::Unit;
        use wardian_cpu::bits::cr0;
        let cr0 = self.core.sys.cr0;
        match unit {
            Unit::X87 => Trap::nm(),
            Unit::Sse if cr0 & cr0::EM == 0 && self.core.sys.cr4 & wardian_cpu::bits::cr4::OSFXSR != 0 => {
                Trap::nm()
            }
            Unit::Avx if !self.core.mode().avx_off() => Trap::nm(),
            Unit::Evex if !self.core.mode().evex_off() => Trap::nm(),
            _ => Trap::ud(),
        }
    }

    /// Runs the instruction at RIP; says whether it was one for the interpreter (if not, nothing was done).
    fn interpret(&mut self) -> Result<bool> {
        self.core.counters.interpreted += 1;
        self.core.journal_used = 0;
        let insn = self.decode()?;
        let class = treatment(&mut self.table, &insn, self.core.mode()).class;
        if !matches!(class, Class::Interpret | Class::System | Class::Unknown) {
            // Another vCPU has rewritten the instruction since it was translated (kernels do it by way of INT3): the
            // translation is stale, and the word of it may still be on its way.
            let linear = self.core.c().rip;
            let page = self.core.fetch_page(linear)?.page as u32;
            self.translator.invalidate(page, 1 << (linear >> 6 & 63));
            return Ok(false);
        }
        self.loads_ss = matches!(
            insn.mnemonic(),
            iced_x86::Mnemonic::Mov | iced_x86::Mnemonic::Pop | iced_x86::Mnemonic::Lss
        );
        let from = self.core.c().rip;
        self.core.sync_time();
        sys::interpret(&mut self.core, &insn)?;
        let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
        if !(repeats && insn.is_string_instruction() && self.core.c().rip == from) {
            self.core.ctx.get_mut().budget -= 1;
        }
        Ok(true)
    }

    /// After an instruction was interpreted: `None` to go on.
    fn settle(&mut self, result: Result<()>) -> Option<Exit> {
        match result {
            Ok(()) => {
                self.core.journal.clear();
                self.core.journal_fault = false;
                None
            }
            Err(Trap::Exit(exit)) => {
                self.asked = true;
                Some(exit)
            }
            Err(Trap::Exception(exception)) => {
                self.core.journal.clear();
                self.core.journal_fault = false;
                self.core.counters.exceptions += 1;
                if sys::deliver(&mut self.core, Event::Exception(exception)).is_err() {
                    return Some(self.shutdown());
                }
                // A debugger's step over a fault ends at the handler.
                self.single().then_some(Exit::Debug(DebugEvent::Step))
            }
            Err(Trap::Alone) => {
                self.core.begin_alone();
                None
            }
            Err(Trap::TripleFault) => Some(self.shutdown()),
        }
    }

    /// An indirect jump to an address that is not canonical faults as itself, not at its target.
    fn wild_jump(&mut self) -> Option<Exit> {
        let source = self.core.c().source as usize;
        if let Some(block) = self.translator.blocks.all.get(source) {
            let rsp = self.core.gpr(CpuState::RSP).wrapping_sub(i64::from(block.moved) as u64);
            let last = bases::settled(&self.core.ctx, block.base, block.last);
            let ctx = self.core.ctx.get_mut();
            ctx.rip = last;
            ctx.budget += 1; // it was counted
            self.core.set_gpr(CpuState::RSP, rsp);
        }
        self.settle(Err(Trap::gp(0)))
    }

    fn shutdown(&mut self) -> Exit {
        self.core.sys.activity = Activity::Shutdown;
        Exit::Shutdown
    }

    /// After a completed instruction: single step and watchpoints.
    fn completed(&mut self, stepped: bool) -> Option<Exit> {
        let hit = std::mem::take(&mut self.core.watch_hit);
        if hit >> 63 != 0 {
            return Some(Exit::Debug(DebugEvent::Watchpoint(self.core.watch_address)));
        }
        let dr6 = (hit & 15) | if stepped { 1 << 14 } else { 0 };
        if dr6 != 0 {
            let trap = Err(Trap::db(dr6));
            if let Some(exit) = self.settle(trap) {
                return Some(exit);
            }
        }
        self.single().then_some(Exit::Debug(DebugEvent::Step))
    }

    fn go(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.core.out.pop_front() {
                if exit != Exit::Halt {
                    return exit;
                }
                self.core.sys.activity = Activity::Halted;
                continue;
            }
            let resuming = !self.core.journal.is_empty() || self.core.alone;
            if resuming {
                // What was begun is completed, though the limit may be another now.
                if self.spent() {
                    self.core.set_budget(1);
                }
            } else {
                self.core.sync_time();
                self.attention();
                if self.events().is_err() {
                    return self.shutdown();
                }
                if std::mem::take(&mut self.kicked) {
                    return Exit::Interrupted;
                }
                match self.core.sys.activity {
                    Activity::Running => {}
                    Activity::Halted | Activity::WaitForSipi => return Exit::Halt,
                    Activity::Shutdown => return Exit::Shutdown,
                }
                if self.spent() {
                    return Exit::Limit;
                }
                if self.core.mode_dirty {
                    self.update_stops();
                }
                match self.breakpoint() {
                    None => {}
                    Some(None) => continue,
                    Some(exit) => return exit.unwrap_or(Exit::Interrupted),
                }
            }
            let alone = self.core.alone;
            let exit = self.step(resuming);
            if alone {
                self.core.end_alone();
            }
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    /// Runs translated code until something needs the outer loop; `Some` to leave `run`.
    fn step(&mut self, resuming: bool) -> Option<Exit> {
        let mut id = match self.block() {
            Ok(id) => id,
            Err(trap) => return self.settle(Err(trap)),
        };
        let shadow = std::mem::take(&mut self.core.sys.interrupt_shadow);
        if shadow && self.core.irq.pending().any() {
            // What the shadow holds off is due at the next block head.
            self.core.c().attention.fetch_or(RECHECK, Ordering::AcqRel);
        }
        let pass = self.pass.take();
        let mut first = resuming || shadow || pass.is_some();
        let mut entered = 0u32;
        loop {
            let tf = self.core.c().rflags & rflags::TF != 0;
            let single = self.core.mode().single();
            if self.check.is_some() && !first {
                match self.checked(id) {
                    check::Checked::No => {
                        // The mode was put back with the rest.
                        id = match self.block() {
                            Ok(id) => id,
                            Err(trap) => return self.settle(Err(trap)),
                        };
                    }
                    check::Checked::Done => return None,
                    check::Checked::Differs => return Some(Exit::Interrupted),
                }
            }
            let block = &self.translator.blocks.all[id as usize];
            let at = if std::mem::take(&mut first) { block.body } else { block.head };
            let start = self.core.c().rip;
            entered = entered.saturating_add(1);
            self.enter(at);
            let ctx = self.core.c();
            let (leave, arg, rip) = (ctx.leave, ctx.arg, ctx.rip);
            self.core.counters.left[leave as usize % LEAVES] += 1;
            let begun = [Leave::Trap, Leave::Interpret, Leave::Budget].iter().any(|l| leave == *l as u32);
            if !begun {
                // Answers that nobody asked for again: the instruction was rewritten meanwhile.
                self.core.journal.clear();
            }
            let ctx = self.core.c();
            match leave {
                l if l == Leave::Chain as u32 || l == Leave::Lookup as u32 || l == Leave::Edge as u32 => {
                    if ctx.attention.load(Ordering::Acquire) != 0 {
                        return None;
                    }
                    if !self.stops.is_empty() && self.stops.contains(&rip) {
                        return None;
                    }
                    if self.core.mode().code64() && !crate::access::is_canonical(rip) {
                        return self.wild_jump();
                    }
                    let flushes = self.core.counters.cache_flushes;
                    id = match self.block() {
                        Ok(id) => id,
                        Err(trap) => return self.settle(Err(trap)),
                    };
                    let block = &self.translator.blocks.all[id as usize];
                    if l == Leave::Lookup as u32 {
                        self.set_jump(id, rip);
                    } else if flushes == self.core.counters.cache_flushes
                        && self.stops.is_empty()
                        && self.check.is_none()
                    {
                        let (head, base) = (block.head, block.base);
                        if !block.chainable() {
                            self.set_jump(id, rip);
                            if l == Leave::Chain as u32 {
                                self.translator.detour(arg, rip, self.core.mode().view());
                            }
                        } else if l == Leave::Chain as u32 {
                            self.translator.code.patch(arg, head);
                        } else if base != 0 {
                            self.translator.link(arg, base, head);
                        }
                    }
                }
                l if l == Leave::Interpret as u32 => {
                    // A CLI right behind an STI block must not hide an interrupt for ever.
                    if rip != start && ctx.attention.load(Ordering::Acquire) != 0 {
                        return None;
                    }
                    if self.spent() {
                        return None;
                    }
                    let result = self.interpret();
                    let done = matches!(result, Ok(true));
                    if let Some(exit) = self.settle(result.map(|_| ())) {
                        return Some(exit);
                    }
                    if done && (single || self.core.watch_hit != 0) {
                        let held = self.core.sys.interrupt_shadow && self.loads_ss;
                        return self.completed(tf && single && !held);
                    }
                    return None;
                }
                l if l == Leave::Completed as u32 => {
                    if single || self.core.watch_hit != 0 {
                        return self.completed(tf && single);
                    }
                    return None;
                }
                l if l == Leave::Budget as u32 => {
                    if entered == 1 {
                        // Nothing was run.
                        self.core.sys.interrupt_shadow = shadow;
                        self.pass = pass;
                    }
                    if !self.spent() {
                        self.slowly = true;
                        self.core.mode_dirty = true;
                    }
                    return None;
                }
                l if l == Leave::Trap as u32 => {
                    let trap = self.core.trap.take().unwrap_or(Trap::TripleFault);
                    return self.settle(Err(trap));
                }
                l if l == Leave::HostFault as u32 => {
                    let unmasked = self.core.sys.cr4 & wardian_cpu::bits::cr4::OSXMMEXCPT != 0;
                    return self.settle(Err(host_fault(arg, unmasked)));
                }
                _ => return None,
            }
        }
    }
}

/// The guest exception for host exception `vector`.
fn host_fault(vector: u32, xmm_exceptions: bool) -> Trap {
    match vector {
        // An operating system that knows no #XM gets #UD.
        19 if !xmm_exceptions => Trap::ud(),
        6 => Trap::ud(),
        13 => Trap::gp(0),
        other => Trap::vector(other as u8),
    }
}

/// Copies guest RAM bytes.
fn read_host(host: usize, out: &mut [u8]) {
    // SAFETY: callers pass an address in a RAM page and a length that stays in it.
    unsafe { std::ptr::copy_nonoverlapping(host as *const u8, out.as_mut_ptr(), out.len()) };
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, answer: Answer) -> std::result::Result<Exit, EngineError> {
        if self.delay.is_none() && !self.core.time.is_counted() {
            self.delay = Some(RunDelay::of_this_thread());
        }
        if std::mem::take(&mut self.asked) {
            let value = match answer {
                Answer::Data(value) => value,
                Answer::None => 0,
                Answer::Fault => {
                    self.core.journal_fault = true;
                    0
                }
            };
            self.core.journal.push(value);
        }
        let core_ptr: *mut Core = &raw mut *self.core;
        self.core.ctx.get_mut().core = core_ptr as u64;
        signals::set_running(Some(Running {
            code: &raw const self.translator.code,
            blocks: &raw const self.translator.blocks,
            ctx: self.core.ctx.as_ptr(),
            leave: self.translator.code.exec(self.translator.thunks.leave[Leave::HostFault as usize]),
        }));
        fpu::enter(&mut self.core);
        self.shared.enter(&self.mailbox);
        let exit = self.go();
        self.core.sync_time();
        self.core.end_alone();
        self.shared.leave(&self.mailbox);
        fpu::leave(&mut self.core);
        signals::set_running(None);
        self.core.counters.exits += 1;
        if let Some(what) = self.check.as_mut().and_then(|check| check.differs.take()) {
            return Err(EngineError::Unsupported { vcpu: self.core.index, rip: self.core.c().rip, what });
        }
        Ok(exit)
    }

    fn state(&mut self) -> CpuState {
        fpu::complete(&mut self.core);
        CpuState { interrupt_owed: self.interrupt_owed, nmi_owed: self.nmi_owed, ..state::save(&self.core) }
    }

    fn glance(&mut self) -> Glance {
        let ctx = self.core.c();
        Glance {
            rip: ctx.rip,
            user: self.core.sys.cpl == 3,
            interrupts_enabled: ctx.rflags & rflags::IF != 0,
            interrupts: self.core.counters.interrupts,
        }
    }

    fn set_state(&mut self, new: &CpuState) -> std::result::Result<(), EngineError> {
        state::restore(&mut self.core, new)?;
        (self.interrupt_owed, self.nmi_owed) = (new.interrupt_owed, new.nmi_owed);
        fpu::spread(&mut self.core);
        self.core.flush_tlb(crate::tlb::Flush::All);
        self.core.mode_dirty = true;
        self.core.journal.clear();
        self.core.out.clear();
        self.asked = false;
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.mailbox) as Arc<dyn Kick>
    }

    fn set_debug(&mut self, request: &DebugRequest) {
        if self.debug == *request {
            return;
        }
        self.debug = request.clone();
        self.pass = None;
        self.core.set_debug_watch(&request.watchpoints);
        self.core.mode_dirty = true;
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.core.peek_translation(linear)
    }

    fn resumed(&mut self) {
        self.refresh_clock(true);
    }

    fn retired(&self) -> Option<u64> {
        self.translator.counting.then(|| self.core.retired())
    }

    fn set_limit(&mut self, limit: Option<u64>) {
        if !self.translator.counting {
            self.forget_code();
            self.translator.counting = true;
        }
        let now = self.core.retired();
        let left = limit.map(|at| at.saturating_sub(now)).and_then(|left| i64::try_from(left).ok());
        self.core.set_budget(left.unwrap_or(i64::MAX));
        if std::mem::take(&mut self.slowly) {
            self.core.mode_dirty = true;
        }
    }

    fn on_taken(&mut self, told: Option<OnTaken>) {
        self.on_taken = told;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.core.counters;
        let mut all = vec![
            ("translations", c.translations),
            ("translated_instructions", c.translated_instructions),
            ("translation_us", ticks_to_nanos(c.translation_ticks).0 / 1000),
            ("code_bytes", u64::from(self.translator.used())),
            ("cache_flushes", c.cache_flushes),
            ("code_invalidations", c.code_invalidations),
            ("lookups", c.lookups),
            ("entries", c.entries),
            ("jump_conflicts", c.jump_conflicts),
            ("slow_accesses", c.slow_accesses),
            ("tlb_misses", c.tlb_misses),
            ("tlb_flushes", c.tlb_flushes),
            ("page_invalidations", c.page_invalidations),
            ("space_switches", c.space_switches),
            ("interpreted", c.interpreted),
            ("syscalls", c.syscalls),
            ("exceptions", c.exceptions),
            ("interrupts", c.interrupts),
            ("nmis", c.nmis),
            ("exits", c.exits),
        ];
        if let Some(check) = &self.check {
            all.extend([
                ("checked_runs", check.compared),
                ("checked_taken_back", check.taken_back),
                ("checked_disturbed", check.disturbed),
            ]);
        }
        all.extend(self.retired().map(|count| ("retired_instructions", count)));
        all.extend(LEFT.into_iter().zip(c.left));
        all.extend(self.core.straight.counts());
        all
    }
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.mailbox.attach(std::ptr::null());
    }
}

/// What a vCPU is made of.
pub(crate) struct Parts {
    pub index: usize,
    pub cpus: usize,
    pub mem: GuestMemory,
    pub time: Arc<TimeBase>,
    pub model: Arc<CpuModel>,
    pub irq: Arc<dyn LocalInterrupts>,
}
