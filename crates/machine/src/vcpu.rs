//! The vCPU's thread: run, answer, run.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_cpu::{Answer, CpuState, DebugEvent, Exit, Vcpu};
use wardian_irq::LocalInterrupts;
use wardian_time::{TimeBase, host_ticks};

use crate::accounts::{Account, Phase};
use crate::board::Board;
use crate::ending::{End, Ending};
use crate::gate::Gate;
use crate::stats::{ExitStats, Kind};
use crate::virtual_time::Pace;
use crate::wake::Wake;

/// One vCPU and what belongs to it.
pub(crate) struct Slot {
    /// Number.
    pub(crate) index: usize,
    /// The vCPU; its thread lets go of it only while it rests at the gate.
    vcpu: Mutex<Box<dyn Vcpu>>,
    pub(crate) wake: Arc<Wake>,
    /// What waits for it.
    pub(crate) local: Arc<dyn LocalInterrupts>,
    pub(crate) account: Account,
    pub(crate) stats: ExitStats,
    /// Kind of the last exit, for display.
    last: AtomicU8,
    /// Who wants to look at the vCPU when its last answer is complete.
    looks: Mutex<Vec<Look>>,
}

/// Something to be done with a vCPU, once, by whoever can first.
#[derive(Clone)]
pub(crate) struct Look(Arc<Mutex<Option<Seen>>>);

type Seen = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

impl Look {
    pub(crate) fn new(seen: Seen) -> Look {
        Look(Arc::new(Mutex::new(Some(seen))))
    }

    /// Does it, unless it is done; says whether it did.
    pub(crate) fn take(&self, vcpu: &mut dyn Vcpu) -> bool {
        let seen = self.cancel();
        let there = seen.is_some();
        if let Some(seen) = seen {
            seen(vcpu);
        }
        there
    }

    /// From now on it is not done, if it was not yet.
    pub(crate) fn cancel(&self) -> Option<Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Slot {
    /// The slot of `vcpu`, number `index`, with its local APIC.
    pub(crate) fn new(index: usize, vcpu: Box<dyn Vcpu>, local: Arc<dyn LocalInterrupts>) -> Slot {
        let wake = Wake::new(vcpu.kicker());
        Slot {
            index,
            vcpu: Mutex::new(vcpu),
            wake,
            local,
            account: Account::default(),
            stats: ExitStats::default(),
            last: AtomicU8::new(u8::MAX),
            looks: Mutex::default(),
        }
    }

    fn looks(&self) -> MutexGuard<'_, Vec<Look>> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wants a look; the caller calls the vCPU to the gate and kicks it.
    pub(crate) fn ask(&self, look: Look) {
        self.looks().push(look);
    }

    /// Shows the vCPU, whose last answer is complete, to all who asked.
    fn show(&self, vcpu: &mut dyn Vcpu) {
        let looks = std::mem::take(&mut *self.looks());
        for look in looks {
            look.take(vcpu);
        }
    }

    /// The vCPU; blocks while it runs.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Box<dyn Vcpu>> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU, unless it runs.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Box<dyn Vcpu>>> {
        match self.vcpu.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// A few words on what the vCPU is doing.
    pub(crate) fn describe(&self) -> String {
        if self.wake.sleeps() {
            return format!("vCPU {}: halted", self.index);
        }
        format!("vCPU {}: last exit {}", self.index, self.last_exit().unwrap_or("none"))
    }

    /// Kind of the last exit.
    pub(crate) fn last_exit(&self) -> Option<&'static str> {
        crate::stats::NAMES.get(usize::from(self.last.load(Ordering::Relaxed))).copied()
    }
}

/// What the vCPU's thread needs besides its slot.
pub(crate) struct Surroundings<'a> {
    pub(crate) board: &'a Board,
    pub(crate) gate: &'a Gate,
    pub(crate) ending: &'a Ending,
    pub(crate) time: &'a TimeBase,
    /// Where time is counted in instructions.
    pub(crate) pace: Option<Pace<'a>>,
    /// The vCPU, at rest now, met a condition of the debugger. Says whether a debugger takes care of it.
    pub(crate) debug: &'a dyn Fn(usize, DebugEvent) -> bool,
    /// Lets this vCPU go on after nobody took care of it.
    pub(crate) release: &'a dyn Fn(usize),
}

/// Linear address of the next instruction.
pub(crate) fn linear_rip(state: &CpuState) -> u64 {
    let long = state.efer & wardian_cpu::bits::efer::LMA != 0 && state.segments[CpuState::CS].long();
    if long { state.rip } else { state.segments[CpuState::CS].base.wrapping_add(state.rip) }
}

/// Runs the vCPU until the machine ends.
pub(crate) fn run_loop(slot: &Slot, around: &Surroundings<'_>) {
    let mut vcpu = slot.lock();
    let mut answer = Answer::None;
    // Whether the last answer is complete: only then may the vCPU be parked, looked at or saved.
    let mut complete = true;
    let account = &slot.account;
    account.begin();
    let mut end = host_ticks();
    while !around.ending.is_set() {
        if around.gate.attention(slot.index) {
            if complete {
                // First dismissed (here and by `rest`), then shown: who asks in between calls again.
                let free = around.gate.dismiss(slot.index);
                slot.show(&mut **vcpu);
                if free {
                    continue;
                }
                drop(vcpu);
                account.enter(Phase::Resting, host_ticks());
                if !around.gate.rest(slot.index) {
                    return;
                }
                end = host_ticks();
                vcpu = slot.lock();
                slot.show(&mut **vcpu);
                continue;
            }
            // The engine completes the answer and comes straight back.
            slot.wake.kick_engine();
        }
        slot.wake.clear();
        if let Some(pace) = around.pace {
            pace.set(&mut **vcpu);
        }
        account.enter(Phase::Guest, end);
        let exit = match vcpu.run(answer) {
            Ok(exit) => exit,
            Err(error) => return around.ending.request(End::Engine(error)),
        };
        let begin = host_ticks();
        let kind = Kind::of(&exit);
        account.enter(kind.phase(), begin);
        slot.last.store(kind as u8, Ordering::Relaxed);
        answer = Answer::None;
        complete = true;
        match exit {
            Exit::Limit => {}
            Exit::Interrupted => {
                if account.wants() {
                    account.give(vcpu.glance());
                }
            }
            Exit::Halt => {
                account.sleeps(vcpu.glance().interrupts_enabled);
                let not_now = || around.gate.attention(slot.index) || around.ending.is_set();
                if !around.pace.is_some_and(Pace::skip) {
                    slot.wake.sleep(around.time.timeline(), not_now);
                }
            }
            Exit::Shutdown => {
                let rip = linear_rip(&vcpu.state());
                around.ending.request(End::TripleFault { vcpu: slot.index, rip });
            }
            Exit::Debug(event) => {
                drop(vcpu);
                around.gate.hold_self(slot.index);
                if !(around.debug)(slot.index, event) {
                    (around.release)(slot.index);
                }
                if !around.gate.rest(slot.index) {
                    return;
                }
                vcpu = slot.lock();
                slot.show(&mut **vcpu);
            }
            ref asks => {
                answer = around.board.handle(slot.index, asks);
                complete = false;
            }
        }
        end = host_ticks();
        let took = end.wrapping_sub(begin);
        slot.stats.record(kind, took);
        if kind.phase() == Phase::Exit {
            account.exit(kind, took);
        }
    }
}
