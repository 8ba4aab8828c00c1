//! Why a vCPU makes no progress: one verdict from what was counted over a window of time.
//!
//! A guest that complains of a soft lockup or an RCU stall, and a vCPU that seems stuck, look the same from inside
//! whether the guest spins or the host does not run it. What tells them apart are the host's accounts.

use serde::Serialize;
use wardian_time::Nanos;

use crate::diary::seconds;

/// Guest code was looked at once: where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sighting {
    /// Linear address of the next instruction.
    pub rip: u64,
    /// In user mode.
    pub user: bool,
    /// Interrupts enabled.
    pub interrupts_enabled: bool,
    /// An interrupt waited at the local APIC.
    pub interrupt_pending: bool,
}

/// What was counted about one vCPU over a window of time. Times are by the host's clock, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Window {
    /// Length of the window.
    pub span_ns: u64,
    /// In the engine, run by the host or not.
    pub guest_ns: u64,
    /// Answering exits.
    pub exits_ns: u64,
    /// Asleep in HLT.
    pub halted_ns: u64,
    /// Parked: the machine was paused, or a debugger held the vCPU.
    pub resting_ns: u64,
    /// The whole process was stopped.
    pub stopped_ns: u64,
    /// The host's scheduler ran the thread; `None`: it does not tell.
    pub ran_ns: Option<u64>,
    /// The thread was runnable and not run.
    pub delayed_ns: u64,
    /// The longest exit.
    pub longest_exit_ns: u64,
    /// What it was.
    pub longest_exit: &'static str,
    /// How late the latest timer was served.
    pub timer_late_ns: u64,
    /// How late the doctor itself was: the host is to blame then, not a thread of ours.
    pub doctor_late_ns: u64,
    /// An interrupt was pending while the vCPU had interrupts disabled.
    pub masked_ns: u64,
    /// Something that wakes the vCPU was pending while it slept.
    pub unwoken_ns: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Guest time ran away from the host's clock by this, while the machine ran.
    pub clock_step_ns: u64,
    /// Intervals of the window in which guest code was to be looked at.
    pub looks: usize,
    /// What was seen.
    pub sightings: Vec<Sighting>,
    /// Another vCPU that the host did not run for most of the window, and for how long.
    pub starved_sibling: Option<(usize, u64)>,
}

/// Who is to blame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "cause")]
pub enum Verdict {
    /// The machine was paused, or a debugger held the vCPU.
    Paused,
    /// The whole process was stopped.
    Stopped,
    /// The host did not run the vCPU's thread: overcommitted, or throttled.
    Steal,
    /// The host held the vCPU's thread for something else than a processor: memory that is swapped out.
    Held,
    /// The vCPU slept though something was there to wake it. A fault of ours.
    LostWakeup,
    /// Timers came late though the host had time. A fault of ours.
    LateTimers,
    /// One exit took most of the window. A fault of ours.
    LongExit,
    /// The engine does not come back when asked. A fault of ours.
    Engine,
    /// Guest time jumped. A fault of ours.
    ClockStep,
    /// The guest spins, perhaps for a lock that a vCPU holds which the host does not run.
    LockHolder {
        /// That vCPU.
        vcpu: usize,
    },
    /// The guest spins in kernel code with interrupts enabled: a soft lockup.
    Spin {
        /// Lowest address seen.
        low: u64,
        /// Highest address seen.
        high: u64,
    },
    /// The guest spins in kernel code with interrupts disabled: a hard lockup.
    MaskedSpin {
        /// Lowest address seen.
        low: u64,
        /// Highest address seen.
        high: u64,
    },
}

impl Verdict {
    /// Whether this is the same cause, wherever in the code.
    pub(crate) fn is_like(&self, other: &Verdict) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// Kernel code that spins stays within so many bytes.
const TIGHT: u64 = 4096;
/// A timer this late, or a sleeper that was not woken for so long, is a fault.
const FAULT: u64 = 1_000_000_000;
/// The doctor may be this late before timers are excused.
const EXCUSED: u64 = 500_000_000;

impl Window {
    /// Time in which the thread was neither asleep nor parked, and did not run.
    #[must_use]
    pub fn unrun_ns(&self) -> u64 {
        let Some(ran) = self.ran_ns else { return self.delayed_ns };
        (self.guest_ns + self.exits_ns).saturating_sub(ran + self.stopped_ns)
    }

    /// Where most of the sightings are, if they are close together.
    fn tight(&self) -> Option<(u64, u64)> {
        let mut places: Vec<u64> = self.sightings.iter().map(|seen| seen.rip).collect();
        places.sort_unstable();
        let enough = (places.len() * 8).div_ceil(10);
        let groups =
            places.windows(enough.max(1)).filter_map(|group| Some((*group.first()?, *group.last()?)));
        groups.min_by_key(|(low, high)| high - low).filter(|(low, high)| high - low <= TIGHT)
    }

    /// The vCPU spins in kernel code.
    fn spin(&self) -> Option<Verdict> {
        if self.sightings.iter().any(|seen| seen.user) {
            return None;
        }
        let (low, high) = self.tight()?;
        let all = self.sightings.len();
        let share = |count: usize| count * 10 >= all * 8;
        let open = self.sightings.iter().filter(|seen| seen.interrupts_enabled).count();
        if share(all - open) && self.masked_ns * 10 >= (self.span_ns - self.unrun_ns().min(self.span_ns)) * 8
        {
            return Some(Verdict::MaskedSpin { low, high });
        }
        // Without interrupts nobody could tell it from a guest that waits for nothing else.
        (share(open) && self.interrupts > 0).then_some(Verdict::Spin { low, high })
    }
}

/// Why the vCPU made no progress, or hardly any, in the window; `None`: it did, or it had nothing to do.
#[must_use]
pub fn judge(w: &Window) -> Option<Verdict> {
    let half = w.span_ns / 2;
    // A window with a pause in it is no measure of anything else.
    if w.resting_ns + w.stopped_ns >= w.span_ns / 10 {
        let verdict = if w.resting_ns >= w.stopped_ns { Verdict::Paused } else { Verdict::Stopped };
        return (w.resting_ns + w.stopped_ns >= half).then_some(verdict);
    }
    if w.clock_step_ns >= FAULT {
        return Some(Verdict::ClockStep);
    }
    let unrun = w.unrun_ns();
    if unrun > half {
        return Some(if w.delayed_ns >= unrun / 2 { Verdict::Steal } else { Verdict::Held });
    }
    // A host that keeps our threads waiting excuses them.
    let idle_host = w.doctor_late_ns < EXCUSED && w.delayed_ns < w.span_ns / 10;
    if w.unwoken_ns >= FAULT && idle_host {
        return Some(Verdict::LostWakeup);
    }
    if w.halted_ns >= half && w.timer_late_ns >= FAULT && idle_host {
        return Some(Verdict::LateTimers);
    }
    if w.longest_exit_ns.saturating_sub(unrun) >= half {
        return Some(Verdict::LongExit);
    }
    let run = w.span_ns - w.resting_ns - w.stopped_ns - unrun;
    if w.guest_ns.saturating_sub(unrun) * 10 < run * 8 || w.looks == 0 {
        return None;
    }
    if w.sightings.is_empty() {
        return (w.looks >= 2).then_some(Verdict::Engine);
    }
    let spin = if w.sightings.len() * 2 >= w.looks { w.spin()? } else { return None };
    Some(w.starved_sibling.map_or(spin, |(vcpu, _)| Verdict::LockHolder { vcpu }))
}

/// The verdict on vCPU `vcpu` in one line.
#[must_use]
pub fn explain(vcpu: usize, verdict: &Verdict, w: &Window) -> String {
    let time = |ns: u64| seconds(Nanos(ns));
    let place = |low: u64, high: u64| {
        if low == high {
            format!("kernel code at {low:#x}")
        } else {
            format!("kernel code at {low:#x} to {high:#x}")
        }
    };
    let why = match verdict {
        Verdict::Paused => "it was paused".to_owned(),
        Verdict::Stopped => format!("the whole process was stopped for {}", time(w.stopped_ns)),
        Verdict::Steal => format!("the host did not run it (steal {})", time(w.delayed_ns)),
        Verdict::Held => format!(
            "the host held its thread for {}, {} of it for want of a processor (memory swapped out?)",
            time(w.unrun_ns()),
            time(w.delayed_ns)
        ),
        Verdict::LostWakeup => {
            format!(
                "it sleeps though an interrupt is there since {} (a fault of Wardian)",
                time(w.unwoken_ns)
            )
        }
        Verdict::LateTimers => {
            format!("it sleeps and timers come {} late (a fault of Wardian)", time(w.timer_late_ns))
        }
        Verdict::LongExit => format!(
            "the answer to one exit ({}) took {} (a fault of Wardian)",
            w.longest_exit,
            time(w.longest_exit_ns)
        ),
        Verdict::Engine => "the engine does not come back from guest code (a fault of Wardian)".to_owned(),
        Verdict::ClockStep => format!("guest time jumped by {} (a fault of Wardian)", time(w.clock_step_ns)),
        Verdict::LockHolder { vcpu: other } => format!(
            "it spins, perhaps for a lock of vCPU {other}, which the host did not run (steal {})",
            time(w.starved_sibling.map_or(0, |sibling| sibling.1))
        ),
        Verdict::Spin { low, high } => {
            format!("it spins in {} with interrupts on ({} taken)", place(*low, *high), w.interrupts)
        }
        Verdict::MaskedSpin { low, high } => format!(
            "it spins in {} with interrupts off (one waits since {})",
            place(*low, *high),
            time(w.masked_ns)
        ),
    };
    if matches!(verdict, Verdict::Steal) && w.unrun_ns() < w.span_ns / 10 * 9 {
        let share = 100 - (w.unrun_ns() * 100 / w.span_ns.max(1)).min(100);
        return format!("vCPU {vcpu} got {share} % of a processor for {}: {why}", time(w.span_ns));
    }
    format!("vCPU {vcpu} made no progress for {}: {why}", time(w.span_ns))
}

/// Whether the verdict is worth a line on the terminal: a vCPU that is only slow is not, nor a pause, which
/// has a line of its own.
#[must_use]
pub fn is_loud(verdict: &Verdict, w: &Window) -> bool {
    match verdict {
        Verdict::Paused | Verdict::Stopped => false,
        Verdict::Steal => w.unrun_ns() >= w.span_ns / 10 * 9,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
