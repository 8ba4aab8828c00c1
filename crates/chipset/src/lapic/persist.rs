//! What is saved of a local APIC. What is pending in it is pending again; LINT0 shows what the 8259 pair requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use wardian_irq::Due;
use wardian_state::check::{Wrong, at_most, ensure, only_bits};
use wardian_state::{Record, Refused};
use wardian_time::{
    Nanos, RunState, Tick, TickConfig, TickState, TimeBase, TimerQueue, TscMode, not_before_saved,
};

use super::regs::{
    ApicMode, BASE_ADDRESS, BASE_BSP, BASE_ENABLE, BASE_X2APIC, LVT_WRITABLE, LapicRegs, SVR_WRITABLE,
    Vectors,
};
use super::{DUE, DUE_ASLEEP, LAPIC_TIMER_HZ, Lapic, NOT_DUE};

/// A local APIC as it is saved. Registers are as the xAPIC page shows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// When it was saved, on the time line.
    pub saved_at_ns: u64,
    /// Its ID, which is the number of the vCPU.
    pub apic_id: u32,
    /// `IA32_APIC_BASE`.
    pub apic_base: u64,
    /// Task priority register.
    pub tpr: u8,
    /// Logical destination register, bits 31:24; an x2APIC's follows from its ID.
    pub ldr: u8,
    /// Destination format register.
    pub dfr: u32,
    /// Spurious interrupt vector register.
    pub svr: u32,
    /// Vectors in service, vector 0 in bit 0 of the first word.
    pub isr: [u32; 8],
    /// Vectors requested.
    pub irr: [u32; 8],
    /// Vectors whose interrupt was level-triggered.
    pub tmr: [u32; 8],
    /// Error status register as it shows,
    pub esr: u32,
    /// and the errors since it was last written.
    pub errors: u32,
    /// Interrupt command register.
    pub icr: u64,
    /// LVT entries: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Initial count register of the timer.
    pub timer_initial: u32,
    /// Divide configuration register.
    pub timer_divide: u8,
    /// The timer's expiries.
    pub timer: TickState,
    /// Whether one waits for the vCPU to look.
    pub timer_due: Due,
    /// `IA32_TSC_DEADLINE`; 0 while disarmed.
    pub tsc_deadline: u64,
    /// The vCPU's time-stamp counter less the machine's, modulo 2^64.
    pub tsc_offset: u64,
    /// An NMI waits.
    pub nmi: bool,
    /// An INIT waits.
    pub init: bool,
    /// A start-up IPI waits: its page.
    pub startup: Option<u8>,
    /// The processor has had an INIT and no start-up IPI since.
    pub waits_for_startup: bool,
}

impl Record for LapicState {
    const KIND: &'static str = "lapic";
    const VERSION: u16 = 1;
}

impl Lapic {
    /// What to save.
    pub(crate) fn save(&self) -> LapicState {
        let due = match self.due.load(Ordering::Acquire) {
            DUE => Due::Waits,
            DUE_ASLEEP => Due::WaitsAsleep,
            _ => Due::No,
        };
        self.look(|regs| regs.save(self.base(), due))
    }

    /// The local APIC of vCPU `id` that was saved as `state`. Guest time, and so the TSC that a deadline counts in,
    /// stands where it did or later: that is why `queue` comes first.
    pub(crate) fn restore(
        id: u32,
        queue: &Arc<TimerQueue>,
        lint0: Arc<AtomicBool>,
        ticks: TickConfig,
        state: &LapicState,
    ) -> Result<Arc<Lapic>, Refused> {
        let level = lint0.load(Ordering::Acquire);
        let regs = LapicRegs::restore(id, queue.base(), ticks, level, state)
            .map_err(|wrong| Refused::new::<LapicState>(format!("vCPU {id}, {wrong}")))?;
        let due = match state.timer_due {
            Due::No => NOT_DUE,
            Due::Waits => DUE,
            Due::WaitsAsleep => DUE_ASLEEP,
        };
        let deadline = regs.tick.deadline();
        let lapic = Lapic::build(queue, lint0, regs);
        lapic.due.store(due, Ordering::Release);
        if due == NOT_DUE {
            lapic.timer.set_line(deadline);
        } // otherwise it is over, and the vCPU sets the next one when it looks
        Ok(lapic)
    }
}

impl LapicRegs {
    fn save(&self, base: &TimeBase, due: Due) -> LapicState {
        LapicState {
            saved_at_ns: base.timeline().0,
            apic_id: self.id,
            apic_base: self.base,
            tpr: self.tpr,
            ldr: self.ldr,
            dfr: self.dfr,
            svr: self.svr,
            isr: self.isr.0,
            irr: self.irr.0,
            tmr: self.tmr.0,
            esr: self.esr,
            errors: self.errors,
            icr: self.icr,
            lvt: self.lvt,
            timer_initial: self.initial,
            timer_divide: self.divide,
            timer: self.tick.save(),
            timer_due: due,
            tsc_deadline: self.deadline,
            tsc_offset: self.tsc_adjust,
            nmi: self.nmi,
            init: self.init,
            startup: self.startup,
            waits_for_startup: self.wait_for_startup,
        }
    }

    fn restore(
        id: u32,
        base: &TimeBase,
        ticks: TickConfig,
        lint0: bool,
        state: &LapicState,
    ) -> Result<LapicRegs, Wrong> {
        not_before_saved("saved_at_ns", state.saved_at_ns, base)?;
        ensure(state.apic_id == id, "apic_id", || {
            format!("{} is not the number of the vCPU", state.apic_id)
        })?;
        let bsp = id == 0;
        only_bits("apic_base", state.apic_base, BASE_ADDRESS | BASE_ENABLE | BASE_X2APIC | BASE_BSP)?;
        let enabled = state.apic_base & (BASE_ENABLE | BASE_X2APIC) != BASE_X2APIC;
        ensure(enabled, "apic_base", || "x2APIC mode of an APIC that is off")?;
        ensure(
            (state.apic_base & BASE_BSP != 0) == bsp,
            "apic_base",
            || "vCPU 0 is the bootstrap processor",
        )?;
        only_bits("dfr", !state.dfr, 0xf000_0000u32)?;
        only_bits("svr", state.svr, SVR_WRITABLE)?;
        for (name, vectors) in [("isr", &state.isr), ("irr", &state.irr), ("tmr", &state.tmr)] {
            only_bits(name, vectors[0], 0xffff_0000u32)?;
        }
        only_bits("esr", state.esr, 0xffu32)?;
        only_bits("errors", state.errors, 0xffu32)?;
        only_bits("icr", state.icr, 0xffff_ffff_000c_cfffu64)?;
        for (entry, (value, writable)) in state.lvt.iter().zip(LVT_WRITABLE).enumerate() {
            only_bits(&format!("lvt[{entry}]"), *value, writable)?;
        }
        only_bits("timer_divide", state.timer_divide, 0x0bu8)?;
        ensure(
            state.startup.is_none() || state.init || state.waits_for_startup,
            "startup",
            || "the processor does not wait for it",
        )?;
        ensure(!bsp || state.startup.is_none(), "startup", || "the bootstrap processor gets none")?;
        ensure(!bsp || !state.waits_for_startup, "waits_for_startup", || "the bootstrap processor does not")?;
        let mut regs = LapicRegs {
            id,
            base: state.apic_base,
            tpr: state.tpr,
            ldr: state.ldr,
            dfr: state.dfr,
            svr: state.svr,
            isr: Vectors(state.isr),
            irr: Vectors(state.irr),
            tmr: Vectors(state.tmr),
            esr: state.esr,
            errors: state.errors,
            icr: state.icr,
            lvt: state.lvt,
            initial: state.timer_initial,
            divide: state.timer_divide,
            tick: Tick::restore(ticks, &state.timer, base.timeline()).map_err(|e| e.within("timer"))?,
            deadline: state.tsc_deadline,
            tsc_adjust: state.tsc_offset,
            lint0,
            nmi: state.nmi,
            init: state.init,
            startup: state.startup,
            wait_for_startup: state.waits_for_startup,
        };
        regs.check_timer(state)?;
        if regs.deadline != 0 && base.tsc_mode() == TscMode::Native {
            regs.deadline = regs.moved_deadline(base, state);
        }
        Ok(regs)
    }

    fn check_timer(&self, state: &LapicState) -> Result<(), Wrong> {
        let every = state.timer.run.every(LAPIC_TIMER_HZ).map_err(|e| e.within("timer"))?;
        if let Some(every) = every {
            let period = self.span(self.initial).0;
            ensure(self.is_periodic() && every == period, "timer.run", || {
                format!("a period of {every} ns, where the registers have {period} ns or none")
            })?;
        }
        if self.is_tsc_deadline() {
            ensure(self.initial == 0, "timer_initial", || "the timer is in TSC-deadline mode")?;
            let once = matches!(state.timer.run, RunState::Once { .. }) && state.timer.raised_at_ns.is_none();
            ensure(self.deadline == 0 || once, "tsc_deadline", || "the timer does not wait for it")?;
        }
        ensure(
            self.deadline == 0 || self.is_tsc_deadline(),
            "tsc_deadline",
            || "the timer is not in TSC-deadline mode",
        )?;
        let disabled = self.mode() == ApicMode::Disabled;
        ensure(!disabled || self.deadline == 0, "tsc_deadline", || "the APIC is off")
    }

    /// Where the guest's counter is the host's own, it is another after a restore: the deadline stays as far away
    /// as it was.
    fn moved_deadline(&self, base: &TimeBase, state: &LapicState) -> u64 {
        let RunState::Once { at_ns } = state.timer.run else { return self.deadline };
        let left = Nanos(at_ns).saturating_sub(base.timeline()).to_ticks(base.tsc_hz());
        self.tsc(base).wrapping_add(left).max(1)
    }
}

/// A number that fits the vCPUs.
pub(crate) fn check_vcpu(field: &str, vcpu: u32, vcpus: usize) -> Result<(), Wrong> {
    at_most(field, vcpu, vcpus as u64 - 1)
}
