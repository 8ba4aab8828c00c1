//! The local APIC: xAPIC and x2APIC (Intel SDM vol. 3A, chapter 11).
//!
//! The timer's input clock is 1 GHz of guest time ([`LAPIC_TIMER_HZ`]): a count is the divisor in
//! nanoseconds. The APIC ID is the number of the vCPU and cannot be changed; vCPU 0 is the bootstrap
//! processor.

pub(crate) mod message;
pub(crate) mod persist;
pub(crate) mod regs;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use wardian_irq::{Delivery, Kick, PendingEvents};
use wardian_time::{Nanos, TickConfig, TimeBase, Timer, TimerHandler, TimerQueue};

use message::Message;
use regs::{Effect, LapicRegs, event};

/// Physical address of the local APIC page.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Input clock of the local APIC timer, in Hz of guest time (before the divide register).
pub const LAPIC_TIMER_HZ: u64 = 1_000_000_000;

/// Values of [`Lapic::due`]: the tick is due, and the vCPU ran or slept in HLT when it came so.
const NOT_DUE: u8 = 0;
const DUE: u8 = 1;
const DUE_ASLEEP: u8 = 2;

/// The access to a model-specific register is refused: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Access to a model-specific register of the interrupt controller is refused")]
pub struct MsrFault;

/// One local APIC.
///
/// Lock order: `state`, then the timer queue's. No other chip's lock is held with `state`, and the kick
/// is called without it.
pub(crate) struct Lapic {
    state: Mutex<LapicRegs>,
    /// What is pending (bits of [`event`]), kept up to date under the lock of `state`.
    events: AtomicU32,
    /// The timer's tick is to be offered on the vCPU's thread.
    due: AtomicU8,
    kick: OnceLock<Arc<dyn Kick>>,
    timer: Timer,
    /// The 8259 pair's request, wired to LINT0.
    lint0: Arc<AtomicBool>,
}

impl Lapic {
    pub(crate) fn new(
        id: u32,
        queue: &Arc<TimerQueue>,
        lint0: Arc<AtomicBool>,
        ticks: TickConfig,
    ) -> Arc<Lapic> {
        Self::build(queue, lint0, LapicRegs::new(id, ticks))
    }

    fn build(queue: &Arc<TimerQueue>, lint0: Arc<AtomicBool>, regs: LapicRegs) -> Arc<Lapic> {
        Arc::new_cyclic(|this: &Weak<Lapic>| Lapic {
            events: AtomicU32::new(regs.events()),
            state: Mutex::new(regs),
            due: AtomicU8::new(NOT_DUE),
            kick: OnceLock::new(),
            timer: queue.timer(this.clone() as Weak<dyn TimerHandler>),
            lint0,
        })
    }

    fn base(&self) -> &TimeBase {
        self.timer.base()
    }

    /// Changes the state, then updates timer and events, then kicks if something became pending.
    fn change<R>(&self, change: impl FnOnce(&mut LapicRegs) -> R) -> R {
        self.change_timed(false, change)
    }

    /// Likewise; `expired`: the timer's deadline has passed, so that it is not set whatever it was.
    fn change_timed<R>(&self, expired: bool, change: impl FnOnce(&mut LapicRegs) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.tick.deadline();
        let result = change(&mut state);
        let after = state.tick.deadline();
        if expired || before != after {
            self.timer.set_line(after);
        }
        let events = state.events();
        let new = events & !self.events.swap(events, Ordering::AcqRel);
        drop(state);
        if new != 0 {
            self.kick_vcpu();
        }
        result
    }

    /// Whether the vCPU sleeps in HLT and did at `point`.
    pub(crate) fn slept_at(&self, point: Nanos) -> bool {
        self.kick.get().is_some_and(|kick| kick.slept_at(point))
    }

    /// Makes the vCPU look.
    pub(crate) fn kick_vcpu(&self) {
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    fn look<R>(&self, look: impl FnOnce(&LapicRegs) -> R) -> R {
        look(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is pending, a tick that is due included: called on the vCPU's thread. Takes no lock without one.
    pub(crate) fn pending(&self) -> PendingEvents {
        if self.due.load(Ordering::Acquire) != NOT_DUE {
            let slept = self.due.swap(NOT_DUE, Ordering::AcqRel) == DUE_ASLEEP;
            self.change_timed(true, |state| state.offer(self.base(), slept));
        }
        self.events()
    }

    fn events(&self) -> PendingEvents {
        let events = self.events.load(Ordering::Acquire);
        PendingEvents {
            interrupt: events & event::INTERRUPT != 0,
            nmi: events & event::NMI != 0,
            init: events & event::INIT != 0,
            startup: events & event::STARTUP != 0,
        }
    }

    pub(crate) fn attach(&self, kick: Arc<dyn Kick>) {
        if self.kick.set(kick).is_ok() && (self.events().any() || self.due.load(Ordering::Acquire) != NOT_DUE)
        {
            self.kick_vcpu();
        }
    }

    /// Takes a vector into service; `Err(())` when the 8259 pair is to be asked for it.
    pub(crate) fn acknowledge(&self) -> Result<Option<u8>, ()> {
        self.change(|state| state.acknowledge(self.base()))
    }

    pub(crate) fn take_nmi(&self) -> bool {
        self.change(LapicRegs::take_nmi)
    }

    pub(crate) fn take_init(&self) -> bool {
        self.change(LapicRegs::take_init)
    }

    pub(crate) fn take_startup(&self) -> Option<u8> {
        self.change(LapicRegs::take_startup)
    }

    pub(crate) fn cr8(&self) -> u8 {
        self.look(LapicRegs::cr8)
    }

    pub(crate) fn set_cr8(&self, priority: u8) {
        self.change(|state| state.set_cr8(priority));
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.look(LapicRegs::base)
    }

    pub(crate) fn set_apic_base(&self, value: u64) -> Result<(), MsrFault> {
        self.change(|state| state.set_base(value))
    }

    pub(crate) fn read_deadline(&self) -> u64 {
        self.look(LapicRegs::read_deadline)
    }

    pub(crate) fn write_deadline(&self, value: u64) {
        self.change(|state| state.write_deadline(value, self.base()));
    }

    pub(crate) fn set_tsc_adjust(&self, adjust: u64) {
        self.change(|state| state.set_tsc_adjust(adjust, self.base()));
    }

    /// A 32-bit read in the APIC page; `None` while the page does not decode.
    pub(crate) fn page_read(&self, register: u8) -> Option<u32> {
        self.change(|state| state.decodes_page().then(|| state.page_read(register, self.base())))
    }

    /// A 32-bit write in the APIC page.
    #[must_use]
    pub(crate) fn page_write(&self, register: u8, value: u32) -> Option<Effect> {
        self.change(
            |state| {
                if state.decodes_page() { state.page_write(register, value, self.base()) } else { None }
            },
        )
    }

    /// RDMSR of 800h + `register`.
    pub(crate) fn msr_read(&self, register: u8) -> Result<u64, MsrFault> {
        self.look(|state| state.msr_read(register, self.base()))
    }

    /// WRMSR of 800h + `register`.
    pub(crate) fn msr_write(&self, register: u8, value: u64) -> Result<Option<Effect>, MsrFault> {
        self.change(|state| state.msr_write(register, value, self.base()))
    }

    /// Receives `message` if its destination names this APIC.
    pub(crate) fn receive(&self, message: &Message) -> Delivery {
        self.change(|state| if state.matches(message) { state.accept(message) } else { Delivery::Masked })
    }

    /// Receives `message` whatever its destination.
    pub(crate) fn accept(&self, message: &Message) -> Delivery {
        self.change(|state| state.accept(message))
    }

    /// Priority for the arbitration of `message`; `None` if it is not for this APIC or would be refused.
    pub(crate) fn arbitration(&self, message: &Message) -> Option<u8> {
        self.look(|state| state.matches(message).then(|| state.arbitration()).flatten())
    }

    /// The 8259 pair's request may have changed.
    pub(crate) fn look_at_lint0(&self) {
        self.change(|state| state.set_lint0(self.lint0.load(Ordering::Acquire)));
    }

    /// Named values, for `inspect`.
    pub(crate) fn inspect(&self) -> Vec<(String, String)> {
        self.look(|state| state.inspect(self.base()))
    }
}

impl TimerHandler for Lapic {
    fn expired(&self, now: Nanos) {
        // The queue fires once per deadline: the timer is set again when the tick was offered.
        let point = self.look(LapicRegs::next_tick).unwrap_or(now);
        self.due.store(if self.slept_at(point) { DUE_ASLEEP } else { DUE }, Ordering::Release);
        self.kick_vcpu();
    }
}
