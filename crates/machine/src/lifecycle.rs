//! From the first start to the end: reset, power-off, the debugger, the way out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_chipset::power::PowerRequest;
use wardian_cpu::Vcpu;
use wardian_gdb::{Door, OpenDoor, Target};
use wardian_memory::GuestMemory;

use crate::accounts::TimeSpent;
use crate::ending::{End, Ending};
use crate::error::{MachineError, Outcome};
use crate::stats::{ExitStats, Stats, TimerStats};
use crate::vm::{DebugHook, Parts, PauseGuard, Vm, vcpu_stats};

/// Makes the parts of the machine, in their state after reset. Called for each life anew.
pub(crate) type Assemble = Box<dyn FnMut(bool) -> Result<Parts, MachineError> + Send>;

/// What outlives a reset and is shared with other threads.
pub(crate) struct Shared {
    cpus: usize,
    ending: Arc<Ending>,
    vm: Mutex<Option<Arc<Vm>>>,
    door: Mutex<Option<Arc<OpenDoor>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn vm(&self) -> Option<Arc<Vm>> {
        lock(&self.vm).clone()
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

/// A way to pause, look at and end a machine from any thread but those of the machine itself.
#[derive(Clone)]
pub struct Control(Arc<Shared>);

impl Control {
    /// Pauses the machine; returns when it has stopped. Pauses nest. `None` when it does not run: before
    /// the start, during a reset, after the end.
    #[must_use]
    pub fn pause(&self) -> Option<PauseGuard> {
        self.0.vm().map(|vm| vm.pause())
    }

    /// Where the time of each vCPU went since the last reset, while the machine runs.
    #[must_use]
    pub fn time_spent(&self) -> Vec<TimeSpent> {
        self.0.vm().map(|vm| vm.time_spent()).unwrap_or_default()
    }

    /// Calls `f` with vCPU `index`, which must be paused or held by a debugger; says whether it was called.
    pub fn with_vcpu(&self, index: usize, f: &mut dyn FnMut(&mut dyn Vcpu)) -> bool {
        self.0.with_vcpu(index, f)
    }

    /// Guest RAM, while the machine runs.
    #[must_use]
    pub fn memory(&self) -> Option<GuestMemory> {
        Target::memory(&*self.0)
    }

    /// Ends the machine; [`Outcome::Outside`] is what comes of it.
    pub fn end(&self) {
        self.0.ending.request(End::Outside);
    }
}

/// A machine that is built and may run.
pub(crate) struct Runner {
    assemble: Assemble,
    first: Option<Parts>,
    no_reboot: bool,
    shared: Arc<Shared>,
    door: Option<Door>,
    exits: Vec<ExitStats>,
    time: Vec<TimeSpent>,
    engine: Vec<Vec<(&'static str, u64)>>,
    reboots: u64,
    name: String,
    clock: (u64, u64),
    timers: TimerStats,
}

impl Runner {
    /// Makes the first life of the machine, whose vCPUs are held if `held`.
    pub(crate) fn new(
        mut assemble: Assemble,
        held: bool,
        no_reboot: bool,
        ending: Arc<Ending>,
    ) -> Result<Runner, MachineError> {
        let first = assemble(held)?;
        let cpus = first.slots.len();
        let shared = Arc::new(Shared { cpus, ending, vm: Mutex::default(), door: Mutex::default() });
        Ok(Runner {
            assemble,
            name: first.name.clone(),
            first: Some(first),
            no_reboot,
            shared,
            door: None,
            time: vec![TimeSpent::default(); cpus],
            exits: std::iter::repeat_with(ExitStats::default).take(cpus).collect(),
            engine: vec![Vec::new(); cpus],
            reboots: 0,
            clock: (0, 1),
            timers: TimerStats::new(),
        })
    }

    /// Lets debuggers in once the machine runs.
    pub(crate) fn set_door(&mut self, door: Door) {
        self.door = Some(door);
    }

    /// A way to control the machine.
    pub(crate) fn control(&self) -> Control {
        Control(Arc::clone(&self.shared))
    }

    /// What was counted so far.
    pub(crate) fn stats(&self, engine_name: &str) -> Stats {
        let rows = self.exits.iter().zip(&self.engine).zip(&self.time).enumerate();
        Stats {
            name: self.name.clone(),
            engine: engine_name.to_owned(),
            guest_ns: self.clock.0,
            reboots: self.reboots,
            vcpus: rows
                .map(|(index, ((exits, engine), time))| {
                    vcpu_stats(index, *time, exits, engine.clone(), self.clock.1)
                })
                .collect(),
            timers: self.timers.clone(),
        }
    }

    /// Runs to the end.
    pub(crate) fn run(&mut self) -> Outcome {
        let outcome = match self.lives() {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(error),
        };
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
                    self.reboots += 1;
                    let debugged = self.shared.door().is_some();
                    parts = (self.assemble)(debugged)?;
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
        let reborn = self.reboots > 0;
        let weak = Arc::downgrade(&self.shared);
        let hook: DebugHook = Arc::new(move |index, event| {
            weak.upgrade().and_then(|shared| shared.door()).is_some_and(|door| door.stopped(index, event))
        });
        let vm = Vm::new(parts, Arc::clone(&self.shared.ending), hook);
        *lock(&self.shared.vm) = Some(Arc::clone(&vm));
        let started = vm.start().map_err(host).and_then(|()| {
            if let Some(door) = self.door.take() {
                let open = door.open(Arc::clone(&self.shared) as Arc<dyn Target>)?;
                *lock(&self.shared.door) = Some(Arc::new(open));
            } else if reborn
                && let Some(door) = self.shared.door()
                && !door.rebuilt()
            {
                vm.release(&|_| true);
            }
            Ok(())
        });
        if started.is_ok() {
            self.shared.ending.wait();
        }
        self.timers = vm.timers();
        vm.finish();
        let end = self.shared.ending.take();
        vm.add_stats(&self.exits);
        for (total, life) in self.time.iter_mut().zip(vm.time_spent()) {
            *total += life;
        }
        self.engine = vm.engine_counters();
        self.clock = vm.clock();
        *lock(&self.shared.vm) = None;
        started?;
        Ok(end.unwrap_or(End::Outside))
    }
}
