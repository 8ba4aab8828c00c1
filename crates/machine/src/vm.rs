//! One life of the machine, from reset to power-off or the next reset: its vCPUs, its time, its threads.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use wardian_cpu::{DebugEvent, Vcpu};
use wardian_irq::Kick;
use wardian_memory::GuestMemory;
use wardian_time::{Nanos, ResumePolicy, TimerQueue, host_hz, host_ticks, ticks_to_nanos};

use crate::accounts::TimeSpent;
use crate::board::Board;
use crate::diary::{Diary, Happening, seconds};
use crate::doctor::{Bell, Doctor};
use crate::ending::{End, Ending};
use crate::gate::Gate;
use crate::operate::Buttons;
use crate::stats::{ExitStats, TimerStats, VcpuStats};
use crate::vcpu::{Slot, Surroundings, run_loop};
use crate::virtual_time::Pace;

/// Asked when a vCPU meets a condition of the debugger: whether a debugger takes care of it.
pub(crate) type DebugHook = Arc<dyn Fn(usize, DebugEvent) -> bool + Send + Sync>;

/// A device with threads of its own that write guest memory.
pub(crate) trait Worker: Send + Sync {
    /// Stops after the request at hand; returns when it has.
    fn pause(&self);
    /// Ends a pause.
    fn resume(&self);
    /// Pauses for good, with everything written durable.
    fn stop(&self);
}

/// What a [`Vm`] is made of.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) memory: GuestMemory,
    pub(crate) queue: Arc<TimerQueue>,
    pub(crate) board: Board,
    pub(crate) slots: Vec<Slot>,
    /// Devices with threads of their own.
    pub(crate) workers: Vec<Arc<dyn Worker>>,
    /// Whatever else must live as long as the machine.
    pub(crate) keep: Vec<Box<dyn Any + Send + Sync>>,
    /// Every vCPU starts held.
    pub(crate) held: bool,
    /// Where it is told what happens.
    pub(crate) diary: Arc<Diary>,
    /// What an operator can press.
    pub(crate) buttons: Arc<Buttons>,
    /// What guest time does about a pause.
    pub(crate) on_resume: ResumePolicy,
    /// How long a vCPU may make no progress; `None`: for ever.
    pub(crate) lockup: Option<Duration>,
}

/// One life of the machine.
///
/// Lock order: `control`, then any one of the gate, the devices, the vCPUs, the time base, the timer queue.
pub(crate) struct Vm {
    memory: GuestMemory,
    queue: Arc<TimerQueue>,
    /// The devices; gone when the machine has ended, whoever still holds the rest.
    devices: Mutex<Option<Devices>>,
    slots: Vec<Slot>,
    gate: Gate,
    ending: Arc<Ending>,
    debug: DebugHook,
    /// Held by whoever stops or starts the vCPUs.
    control: Mutex<()>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    diary: Arc<Diary>,
    on_resume: ResumePolicy,
    lockup: Option<Duration>,
    bell: Bell,
}

struct Devices {
    board: Arc<Board>,
    buttons: Arc<Buttons>,
    workers: Vec<Arc<dyn Worker>>,
    _keep: Vec<Box<dyn Any + Send + Sync>>,
}

/// A pause of the machine: every vCPU rests at a completed answer, every worker has drained, guest time
/// stands still. Dropping it lets the machine go on, kvmclock telling the guest that it was stopped. Of
/// pauses within each other the last to end counts.
#[must_use = "dropping it ends the pause"]
pub struct PauseGuard {
    vm: Arc<Vm>,
    policy: ResumePolicy,
    /// Host ticks.
    since: u64,
}

impl PauseGuard {
    /// Ends the pause, with another policy for guest time than the machine's own.
    pub fn resume(mut self, policy: ResumePolicy) {
        self.policy = policy;
    }
}

impl Vm {
    /// A machine whose threads do not run yet.
    pub(crate) fn new(parts: Parts, ending: Arc<Ending>, debug: DebugHook) -> Arc<Vm> {
        if parts.lockup.is_none() {
            parts.slots.iter().for_each(|slot| slot.account.close());
        }
        Arc::new(Vm {
            memory: parts.memory,
            queue: parts.queue,
            devices: Mutex::new(Some(Devices {
                board: Arc::new(parts.board),
                buttons: parts.buttons,
                workers: parts.workers,
                _keep: parts.keep,
            })),
            gate: Gate::new(parts.slots.len(), parts.held),
            slots: parts.slots,
            ending,
            debug,
            control: Mutex::new(()),
            threads: Mutex::new(Vec::new()),
            diary: parts.diary,
            on_resume: parts.on_resume,
            lockup: parts.lockup,
            bell: Bell::default(),
        })
    }

    fn control(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread whose panic ends the machine.
    fn spawn(self: &Arc<Vm>, name: String, body: impl FnOnce(&Vm) + Send + 'static) -> std::io::Result<()> {
        let vm = Arc::clone(self);
        let label = name.clone();
        // Linux shows 15 characters of a thread's name.
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(&vm))) {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                vm.ending.request(End::Panic(label, text.to_owned()));
            }
        })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Starts time and the threads.
    ///
    /// # Errors
    /// When the host gives no thread; call [`Vm::finish`] all the same.
    pub(crate) fn start(self: &Arc<Vm>) -> std::io::Result<()> {
        {
            let _control = self.control();
            if self.gate.would_run(|_| false, 0) {
                self.resume_time(ResumePolicy::Freeze);
            }
        }
        if self.queue.base().is_counted() {
            // The vCPU's thread serves the timers, and the host's clock is no measure of what a vCPU does.
            return self.spawn_vcpus();
        }
        self.spawn("timers".into(), |vm| vm.queue.serve())?;
        self.spawn("doctor".into(), |vm| {
            let (slots, queue, diary, window) = (&vm.slots, &vm.queue, &vm.diary, vm.lockup);
            Doctor { slots, queue, diary, window }.work(&vm.bell);
        })?;
        self.spawn_vcpus()
    }

    fn spawn_vcpus(self: &Arc<Vm>) -> std::io::Result<()> {
        let Some(board) = self.board() else { return Ok(()) };
        for index in 0..self.slots.len() {
            let board = Arc::clone(&board);
            self.spawn(format!("vcpu{index}"), move |vm| {
                let gone = Gone(vm, index);
                vm.run_vcpu(index, &board);
                drop(gone);
            })?;
        }
        Ok(())
    }

    fn devices(&self) -> MutexGuard<'_, Option<Devices>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices, if they are still there.
    pub(crate) fn board(&self) -> Option<Arc<Board>> {
        self.devices().as_ref().map(|devices| Arc::clone(&devices.board))
    }

    /// What an operator can press, likewise.
    pub(crate) fn buttons(&self) -> Option<Arc<Buttons>> {
        self.devices().as_ref().map(|devices| Arc::clone(&devices.buttons))
    }

    /// The vCPUs.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Who may run.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The timers.
    pub(crate) fn queue(&self) -> &TimerQueue {
        &self.queue
    }

    fn workers(&self) -> Vec<Arc<dyn Worker>> {
        self.devices().as_ref().map(|devices| devices.workers.clone()).unwrap_or_default()
    }

    fn run_vcpu(&self, index: usize, board: &Board) {
        let around = Surroundings {
            board,
            gate: &self.gate,
            ending: &self.ending,
            time: self.queue.base(),
            pace: Pace::of(&self.queue),
            debug: &*self.debug,
            release: &|index| self.release(&|n| n == index),
        };
        run_loop(&self.slots[index], &around);
        self.slots[index].account.end();
    }

    /// Ends all threads, waits for them and drops the devices. Guest time stands still then.
    pub(crate) fn finish(&self) {
        self.gate.leave();
        self.kick();
        self.queue.stop();
        self.bell.ring();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
        self.queue.base().pause();
        let devices = self.devices().take();
        if let Some(devices) = devices {
            devices.workers.iter().for_each(|worker| worker.stop());
        }
    }

    fn kick(&self) {
        self.slots.iter().for_each(|slot| slot.wake.kick());
    }

    /// Guest RAM.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Guest time runs again: every vCPU at rest is told, before it runs.
    fn resume_time(&self, policy: ResumePolicy) {
        let time = self.queue.base();
        if time.is_running() {
            return;
        }
        // Time that does not follow the host's clock does not pass in a pause.
        let virtual_time = policy == ResumePolicy::Advance && !time.follows_host();
        time.resume(if virtual_time { ResumePolicy::Freeze } else { policy });
        self.slots.iter().for_each(|slot| slot.lock().resumed());
        self.queue.wake();
    }

    /// Parks every vCPU and stops guest time; they stay so until [`Vm::release`]d.
    pub(crate) fn hold(&self) {
        let _control = self.control();
        self.gate.hold_all();
        self.stop_at_gate();
    }

    fn stop_at_gate(&self) {
        self.kick();
        self.gate.wait_at_rest();
        self.queue.base().pause();
    }

    /// Ends the hold of some vCPUs.
    pub(crate) fn release(&self, which: &dyn Fn(usize) -> bool) {
        let _control = self.control();
        if self.gate.would_run(which, 0) {
            // To a debugger no time passes while it looks.
            self.resume_time(ResumePolicy::Freeze);
        }
        self.gate.release(which);
    }

    /// Parks every vCPU, stops guest time and every worker, until the guard goes. Pauses nest.
    pub(crate) fn pause(self: &Arc<Vm>) -> PauseGuard {
        // The guard first: whatever happens from here on, the pause is undone.
        self.gate.pause();
        let mut guard = PauseGuard { vm: Arc::clone(self), policy: self.on_resume, since: host_ticks() };
        let _control = self.control();
        self.stop_at_gate();
        guard.since = host_ticks();
        self.workers().iter().for_each(|worker| worker.pause());
        if self.gate.pauses() == 1 {
            self.diary.tell(self.queue.base().now(), true, "Paused".to_owned(), Happening::Paused);
        }
        guard
    }

    fn tell_resumed(&self, paused: Nanos, moved: Nanos) {
        let clocks =
            if moved.0 == 0 { "stood still".to_owned() } else { format!("moved by {}", seconds(moved)) };
        let text = format!("Goes on after a pause of {}; guest time {clocks}", seconds(paused));
        let what = Happening::Resumed { paused_ns: paused.0, guest_moved_ns: moved.0 };
        self.diary.tell(self.queue.base().now(), true, text, what);
    }

    /// Calls `f` with vCPU `index` if it is parked; says whether it was.
    pub(crate) fn with_vcpu(&self, index: usize, f: &mut dyn FnMut(&mut dyn Vcpu)) -> bool {
        let Some(slot) = self.slots.get(index).filter(|_| self.gate.rests(index)) else { return false };
        let Some(mut vcpu) = slot.try_lock() else { return false };
        f(&mut **vcpu);
        true
    }

    /// A few words on what vCPU `index` is doing.
    pub(crate) fn describe(&self, index: usize) -> String {
        self.slots.get(index).map(Slot::describe).unwrap_or_default()
    }

    /// Exits of each vCPU so far, added to `total`.
    pub(crate) fn add_stats(&self, total: &[ExitStats]) {
        for (slot, total) in self.slots.iter().zip(total) {
            total.add(&slot.stats);
        }
    }

    /// Exits of vCPU `index` so far, added to `total`.
    pub(crate) fn add_stats_of(&self, index: usize, total: &ExitStats) {
        if let Some(slot) = self.slots.get(index) {
            total.add(&slot.stats);
        }
    }

    /// Where the time of each vCPU went so far.
    pub(crate) fn time_spent(&self) -> Vec<TimeSpent> {
        self.slots.iter().map(|slot| slot.account.time_spent()).collect()
    }

    /// The engine's counters of each vCPU; those of a vCPU that runs are left out.
    pub(crate) fn engine_counters(&self) -> Vec<Vec<(&'static str, u64)>> {
        self.slots
            .iter()
            .map(|slot| slot.try_lock().map(|vcpu| vcpu.counters()).unwrap_or_default())
            .collect()
    }

    /// What became of the ticks of each timer, while the machine has its devices.
    pub(crate) fn timers(&self) -> TimerStats {
        self.board().map(|board| crate::stats::timers(&board)).unwrap_or_default()
    }

    /// Guest time in nanoseconds, and the rate of the host's ticks.
    pub(crate) fn clock(&self) -> (u64, u64) {
        let time = self.queue.base();
        (time.now().0, host_hz())
    }
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        let vm = &*self.vm;
        let _control = vm.control();
        if vm.gate.pauses() == 1 {
            vm.workers().iter().for_each(|worker| worker.resume());
        }
        let base = vm.queue.base();
        let before = base.timeline();
        let runs = vm.gate.would_run(|_| false, 1);
        if runs {
            vm.resume_time(self.policy);
        }
        let moved = base.timeline().saturating_sub(before);
        let paused = ticks_to_nanos(host_ticks().wrapping_sub(self.since));
        vm.gate.unpause();
        if runs {
            // The clock has run since by some microseconds.
            vm.tell_resumed(paused, if moved < Nanos(1_000_000) { Nanos(0) } else { moved });
        }
    }
}

/// Says that a vCPU's thread has ended, panics included.
struct Gone<'a>(&'a Vm, usize);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.gate.gone(self.1);
    }
}

/// The exits and counters of one vCPU in words.
pub(crate) fn vcpu_stats(
    index: usize,
    time: TimeSpent,
    exits: &ExitStats,
    engine: Vec<(&'static str, u64)>,
    hz: u64,
) -> VcpuStats {
    VcpuStats {
        vcpu: index,
        time,
        exits: exits.summary(hz),
        engine: engine.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    }
}
