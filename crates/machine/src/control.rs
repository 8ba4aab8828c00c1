//! [`Control`]: what others may do to a machine that runs.

use std::sync::{Arc, MutexGuard, PoisonError};

use serde::Serialize;
use wardian_chipset::power::PowerRequest;
use wardian_cpu::Vcpu;
use wardian_gdb::Target;
use wardian_memory::GuestMemory;
use wardian_time::ResumePolicy;

use crate::accounts::TimeSpent;
use crate::ending::End;
use crate::lifecycle::Shared;
use crate::stats::Stats;
use crate::tree::Tree;
use crate::vm::{PauseGuard, Vm};

/// What a machine is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It is built and was not started yet.
    Starting,
    /// Its vCPUs run, or sleep in HLT.
    Running,
    /// It is paused.
    Paused,
    /// A debugger holds every vCPU.
    Held,
    /// It is being built anew after a reset.
    Resetting,
    /// It has ended.
    Ended,
}

/// A way to pause, look at and end a machine from any thread but those of the machine itself.
#[derive(Clone)]
pub struct Control(pub(crate) Arc<Shared>);

/// The pause that users ask for: one, however often they ask.
#[derive(Default)]
pub(crate) struct Parking {
    /// The machine is to be paused, in its next life as well.
    wanted: bool,
    guard: Option<PauseGuard>,
}

impl Parking {
    /// The parking of a machine that begins paused if `wanted`.
    pub(crate) fn new(wanted: bool) -> Parking {
        Parking { wanted, guard: None }
    }
}

impl Shared {
    fn parking(&self) -> MutexGuard<'_, Parking> {
        self.parking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether users want it paused.
    pub(crate) fn is_parked(&self) -> bool {
        self.parking().wanted
    }

    /// The machine has ended.
    pub(crate) fn forget_parking(&self) {
        self.parking().guard = None;
    }

    /// A life of the machine begins with every vCPU held: pauses it, if users still want that. The hold may end
    /// then.
    pub(crate) fn park_again(&self, vm: &Arc<Vm>) {
        let mut parking = self.parking();
        parking.guard = parking.wanted.then(|| vm.pause());
    }
}

impl Control {
    /// Pauses the machine; returns when it has stopped. Pauses nest. `None` when it does not run: before
    /// the start, during a reset, after the end.
    #[must_use]
    pub fn pause(&self) -> Option<PauseGuard> {
        self.0.vm().map(|vm| vm.pause())
    }

    /// Pauses the machine until somebody calls [`Control::unpark`]; returns when it has stopped. A machine that is
    /// being reset begins its next life paused. Says whether it was not parked before.
    pub fn park(&self) -> bool {
        let mut parking = self.0.parking();
        parking.wanted = true;
        let new = parking.guard.is_none();
        if new {
            parking.guard = self.pause();
        }
        new
    }

    /// Ends [`Control::park`], with another policy for guest time than the machine's own if there is one. Says
    /// whether it was parked.
    pub fn unpark(&self, policy: Option<ResumePolicy>) -> bool {
        let mut parking = self.0.parking();
        let parked = std::mem::take(&mut parking.wanted);
        match (parking.guard.take(), policy) {
            (Some(guard), Some(policy)) => guard.resume(policy),
            (guard, _) => drop(guard),
        }
        parked
    }

    /// What it is at.
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// Starts it anew, or ends it if it was configured not to start anew.
    pub fn reset(&self) {
        self.0.ending.request(End::Power(PowerRequest::Reset));
    }

    /// Presses the power button: the guest decides what comes of it. Says whether the machine runs.
    pub fn press_power_button(&self) -> bool {
        self.0.vm().is_some_and(|vm| vm.press_power_button())
    }

    /// Sends an NMI to vCPU `index`; says whether there is one.
    pub fn nmi(&self, index: usize) -> bool {
        self.0.vm().is_some_and(|vm| vm.nmi(index))
    }

    /// What was counted, the present life included. Engine counters of vCPUs that run are left out.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.0.cpus
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

    /// Calls `f` with vCPU `index` as soon as its last answer is complete, whether the machine is paused or not, and
    /// gives what it says. It runs on the vCPU's thread, so it must be short. `None`: there is no such vCPU now, or it
    /// did not answer for two seconds.
    pub fn look<T: Send + 'static>(
        &self,
        index: usize,
        f: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        self.0.vm()?.look(index, f)
    }

    /// Everything that can be looked at, as named values: devices, vCPUs, time. `None`: it does not run.
    #[must_use]
    pub fn inspect(&self) -> Option<Tree> {
        self.0.vm()?.inspect()
    }

    /// What vCPU `index` is doing, and the kind of its last exit.
    #[must_use]
    pub fn doing(&self, index: usize) -> Option<(&'static str, Option<&'static str>)> {
        self.0.vm()?.doing(index)
    }

    /// Guest RAM, while the machine runs.
    #[must_use]
    pub fn memory(&self) -> Option<GuestMemory> {
        Target::memory(&*self.0)
    }

    /// Ends the machine; [`crate::Outcome::Outside`] is what comes of it.
    pub fn end(&self) {
        self.0.ending.request(End::Outside);
    }
}
