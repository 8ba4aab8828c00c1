//! From the first start to the end: reset, power-off, the debugger, the way out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_chipset::power::PowerRequest;
use wardian_cpu::Vcpu;
use wardian_gdb::{Door, OpenDoor, Target};
use wardian_memory::GuestMemory;
use wardian_time::Nanos;

use crate::accounts::TimeSpent;
use crate::control::{Control, Parking, Status};
use crate::diary::Happening;
use crate::ending::{End, Ending};
use crate::error::{MachineError, Outcome};
use crate::stats::{ExitStats, Stats, TimerStats};
use crate::vm::{DebugHook, Parts, Vm, vcpu_stats};

/// Makes the parts of the machine, in their state after reset. Called for each life anew.
pub(crate) type Assemble = Box<dyn FnMut(bool) -> Result<Parts, MachineError> + Send>;

/// What outlives a reset and is shared with other threads.
///
/// Lock order: `parking`, `totals`, `vm`; `door` is a leaf.
pub(crate) struct Shared {
    pub(crate) cpus: usize,
    pub(crate) ending: Arc<Ending>,
    vm: Mutex<Option<Arc<Vm>>>,
    door: Mutex<Option<Arc<OpenDoor>>>,
    pub(crate) parking: Mutex<Parking>,
    totals: Mutex<Totals>,
}

/// What the lives of the machine that are over have come to.
struct Totals {
    name: String,
    engine_name: &'static str,
    stage: Stage,
    exits: Vec<ExitStats>,
    time: Vec<TimeSpent>,
    engine: Vec<Vec<(&'static str, u64)>>,
    reboots: u64,
    clock: (u64, u64),
    timers: TimerStats,
}

/// Where the machine is among its lives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Before,
    Lives,
    Between,
    After,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn vm(&self) -> Option<Arc<Vm>> {
        lock(&self.vm).clone()
    }

    /// What the machine is at.
    pub(crate) fn status(&self) -> Status {
        let stage = lock(&self.totals).stage;
        match (stage, self.vm()) {
            (Stage::After, _) => Status::Ended,
            (Stage::Lives, Some(vm)) => vm.status(),
            (Stage::Between, _) | (_, Some(_)) => Status::Resetting,
            (Stage::Before | Stage::Lives, None) => Status::Starting,
        }
    }

    /// What was counted, with the present life.
    pub(crate) fn stats(&self) -> Stats {
        let totals = lock(&self.totals);
        let vm = self.vm();
        let live = vm.as_deref();
        let clock = live.map_or(totals.clock, Vm::clock);
        let engine = live.map_or_else(|| totals.engine.clone(), Vm::engine_counters);
        let lives = live.map(Vm::time_spent).unwrap_or_default();
        let of_vcpu = |index: usize| {
            let exits = ExitStats::default();
            exits.add(&totals.exits[index]);
            if let Some(vm) = live {
                vm.add_stats_of(index, &exits);
            }
            let mut time = totals.time[index];
            if let Some(life) = lives.get(index) {
                time += *life;
            }
            vcpu_stats(index, time, &exits, engine.get(index).cloned().unwrap_or_default(), clock.1)
        };
        Stats {
            name: totals.name.clone(),
            engine: totals.engine_name.to_owned(),
            guest_ns: clock.0,
            reboots: totals.reboots,
            vcpus: (0..self.cpus).map(of_vcpu).collect(),
            timers: live.map_or_else(|| totals.timers.clone(), Vm::timers),
        }
    }

    fn door(&self) -> Option<Arc<OpenDoor>> {
        lock(&self.door).clone()
    }
}

impl Target for Shared {
    fn vcpus(&self) -> usize {
        self.cpus
    }

    fn memory(&self) -> Option<GuestMemory> {
        self.vm().map(|vm| vm.memory().clone())
    }

    fn stop(&self) {
        if let Some(vm) = self.vm() {
            vm.hold();
        }
    }

    fn resume(&self, run: &[bool]) {
        if let Some(vm) = self.vm() {
            vm.release(&|index| run.get(index).copied().unwrap_or(false));
        }
    }

    fn with_vcpu(&self, index: usize, f: &mut dyn FnMut(&mut dyn Vcpu)) -> bool {
        self.vm().is_some_and(|vm| vm.with_vcpu(index, f))
    }

    fn describe(&self, index: usize) -> String {
        self.vm().map_or_else(|| "being reset".to_owned(), |vm| vm.describe(index))
    }

    fn kill(&self) {
        self.ending.request(End::Outside);
    }
}

/// A machine that is built and may run.
pub(crate) struct Runner {
    assemble: Assemble,
    first: Option<Parts>,
    no_reboot: bool,
    shared: Arc<Shared>,
    door: Option<Door>,
    /// The first life waits for a debugger.
    waits: bool,
}

/// How a machine begins.
#[derive(Clone, Copy, Default)]
pub(crate) struct Begin {
    /// Its vCPUs are held until a debugger lets them go.
    pub(crate) held: bool,
    /// It is paused.
    pub(crate) paused: bool,
    /// Name of its engine.
    pub(crate) engine: &'static str,
}

impl Runner {
    /// Makes the first life of the machine.
    pub(crate) fn new(
        mut assemble: Assemble,
        begin: Begin,
        no_reboot: bool,
        ending: Arc<Ending>,
    ) -> Result<Runner, MachineError> {
        let first = assemble(begin.held || begin.paused)?;
        let cpus = first.slots.len();
        let totals = Totals {
            name: first.name.clone(),
            engine_name: begin.engine,
            stage: Stage::Before,
            exits: std::iter::repeat_with(ExitStats::default).take(cpus).collect(),
            time: vec![TimeSpent::default(); cpus],
            engine: vec![Vec::new(); cpus],
            reboots: 0,
            clock: (0, 1),
            timers: TimerStats::new(),
        };
        let shared = Arc::new(Shared {
            cpus,
            ending,
            vm: Mutex::default(),
            door: Mutex::default(),
            parking: Mutex::new(Parking::new(begin.paused)),
            totals: Mutex::new(totals),
        });
        Ok(Runner { assemble, first: Some(first), no_reboot, shared, door: None, waits: begin.held })
    }

    /// Lets debuggers in once the machine runs.
    pub(crate) fn set_door(&mut self, door: Door) {
        self.door = Some(door);
    }

    /// A way to control the machine.
    pub(crate) fn control(&self) -> Control {
        Control(Arc::clone(&self.shared))
    }

    /// Guest time in the last life.
    pub(crate) fn guest_time(&self) -> Nanos {
        Nanos(lock(&self.shared.totals).clock.0)
    }

    /// Runs to the end.
    pub(crate) fn run(&mut self) -> Outcome {
        let outcome = match self.lives() {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(error),
        };
        lock(&self.shared.totals).stage = Stage::After;
        self.shared.forget_parking();
        // The door holds the machine, the machine the door: this parts them.
        let door = lock(&self.shared.door).take();
        if let Some(door) = door {
            door.ended(outcome.status());
        }
        outcome
    }

    fn lives(&mut self) -> Result<Outcome, MachineError> {
        let mut parts = match self.first.take() {
            Some(parts) => parts,
            None => (self.assemble)(false)?,
        };
        loop {
            let end = self.live(parts)?;
            return Ok(match end {
                End::Power(PowerRequest::PowerOff) => Outcome::PowerOff,
                End::Power(PowerRequest::DebugExit(code)) => Outcome::DebugExit(code),
                End::Power(PowerRequest::Reset) if self.no_reboot => Outcome::Reset,
                End::Power(PowerRequest::Reset) => {
                    tracing::info!("The guest asked for a reset");
                    let mut totals = lock(&self.shared.totals);
                    totals.reboots += 1;
                    totals.stage = Stage::Between;
                    drop(totals);
                    // Who is to be held or paused must not run before.
                    let held = self.shared.door().is_some() || self.shared.is_parked();
                    parts = (self.assemble)(held)?;
                    parts.diary.tell(Nanos(0), false, "Starts anew".to_owned(), Happening::Reset);
                    continue;
                }
                End::TripleFault { vcpu, rip } => Outcome::TripleFault { vcpu, rip },
                End::Engine(error) => return Err(error.into()),
                End::Panic(thread, message) => return Err(MachineError::Panic { thread, message }),
                End::Outside => Outcome::Outside,
            });
        }
    }

    /// One life of the machine.
    fn live(&mut self, parts: Parts) -> Result<End, MachineError> {
        let host = |source| MachineError::Host { what: "a thread", source: Box::new(source) };
        let (reborn, held) = (lock(&self.shared.totals).reboots > 0, parts.held);
        let weak = Arc::downgrade(&self.shared);
        let hook: DebugHook = Arc::new(move |index, event| {
            weak.upgrade().and_then(|shared| shared.door()).is_some_and(|door| door.stopped(index, event))
        });
        let vm = Vm::new(parts, Arc::clone(&self.shared.ending), hook);
        {
            let mut totals = lock(&self.shared.totals);
            *lock(&self.shared.vm) = Some(Arc::clone(&vm));
            totals.stage = Stage::Lives;
        }
        let started = vm.start().map_err(host).and_then(|()| {
            let debugged = if let Some(door) = self.door.take() {
                let open = door.open(Arc::clone(&self.shared) as Arc<dyn Target>)?;
                *lock(&self.shared.door) = Some(Arc::new(open));
                self.waits
            } else {
                // A debugger that is still there keeps the hold.
                reborn && self.shared.door().is_some_and(|door| door.rebuilt())
            };
            if held {
                self.shared.park_again(&vm);
                if !debugged {
                    vm.release(&|_| true);
                }
            }
            Ok(())
        });
        if started.is_ok() {
            self.shared.ending.wait();
        }
        let timers = vm.timers();
        vm.finish();
        let end = self.shared.ending.take();
        {
            // At once, so that nobody counts this life twice.
            let mut totals = lock(&self.shared.totals);
            vm.add_stats(&totals.exits);
            for (total, life) in totals.time.iter_mut().zip(vm.time_spent()) {
                *total += life;
            }
            totals.timers = timers;
            totals.engine = vm.engine_counters();
            totals.clock = vm.clock();
            *lock(&self.shared.vm) = None;
        }
        started?;
        Ok(end.unwrap_or(End::Outside))
    }
}
