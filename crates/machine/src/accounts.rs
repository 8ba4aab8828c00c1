//! Where the time of a vCPU's thread goes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::Serialize;
use wardian_cpu::Glance;
use wardian_time::{Nanos, RunDelay, ThreadTime, host_ticks, ticks_to_nanos};

use crate::stats::{Kind, NAMES, add};

/// What the thread of a vCPU is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// In the engine.
    Guest,
    /// Answering an exit.
    Exit,
    /// Asleep in HLT.
    Halted,
    /// Parked at the gate, or not started yet.
    Resting,
}

const PHASES: usize = 4;
/// Bits of `Account::since` that hold the phase, and the one that says that the account is being changed.
const PHASE: u64 = 3;
const CHANGING: u64 = 4;
const KIND: u64 = 15;

/// The account of one vCPU. Written by its thread, read by anybody.
#[derive(Debug)]
pub(crate) struct Account {
    /// Nobody reads it, so nothing is written.
    closed: AtomicBool,
    /// Host ticks spent in each phase, but for the present stretch.
    spent: [AtomicU64; PHASES],
    /// Host ticks at which the present stretch began; its low bits are the phase.
    since: AtomicU64,
    /// The longest exit since somebody asked: ticks, the low bits are its kind.
    longest: AtomicU64,
    thread: OnceLock<RunDelay>,
    /// What it says once the thread has ended.
    last: OnceLock<ThreadTime>,
    /// Somebody wants a glance.
    wanted: AtomicBool,
    glance: Mutex<Option<Glance>>,
    /// The vCPU sleeps with interrupts enabled.
    open: AtomicBool,
}

impl Default for Account {
    fn default() -> Account {
        Account {
            closed: AtomicBool::new(false),
            spent: Default::default(),
            since: AtomicU64::new(host_ticks() & !(PHASE | CHANGING) | Phase::Resting as u64),
            longest: AtomicU64::new(0),
            thread: OnceLock::new(),
            last: OnceLock::new(),
            wanted: AtomicBool::new(false),
            glance: Mutex::new(None),
            open: AtomicBool::new(false),
        }
    }
}

/// What an account says at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    /// Time in each [`Phase`] so far.
    pub(crate) spent: [Nanos; PHASES],
    pub(crate) phase: Option<Phase>,
    /// How long the present phase has lasted.
    pub(crate) stretch: Nanos,
    /// What the host's scheduler did with the thread, if it tells.
    pub(crate) thread: Option<ThreadTime>,
}

impl Account {
    /// Nothing is written from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Called by the vCPU's thread, first of all.
    pub(crate) fn begin(&self) {
        self.thread.get_or_init(RunDelay::of_this_thread);
    }

    /// Called by the vCPU's thread, last of all.
    pub(crate) fn end(&self) {
        self.enter(Phase::Resting, host_ticks());
        if let Some(times) = self.thread.get().and_then(RunDelay::times) {
            self.last.get_or_init(|| times);
        }
    }

    /// The vCPU's thread is at `phase` from `now` on, in host ticks.
    pub(crate) fn enter(&self, phase: Phase, now: u64) {
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        let old = self.since.load(Ordering::Relaxed);
        let (began, now) = (old & !(PHASE | CHANGING), now & !(PHASE | CHANGING));
        self.since.store(old | CHANGING, Ordering::Relaxed);
        fence(Ordering::Release);
        add(&self.spent[(old & PHASE) as usize], now.saturating_sub(began));
        self.since.store(now.max(began) | phase as u64, Ordering::Release);
    }

    /// An exit took `ticks`.
    pub(crate) fn exit(&self, kind: Kind, ticks: u64) {
        if ticks > self.longest.load(Ordering::Relaxed) {
            self.longest.store(ticks & !KIND | kind as u64, Ordering::Relaxed);
        }
    }

    /// Name and length of the longest exit since this was last asked, the present one (of kind `last`)
    /// counted in.
    pub(crate) fn take_longest(
        &self,
        reading: &Reading,
        last: Option<&'static str>,
    ) -> (&'static str, Nanos) {
        let longest = self.longest.swap(0, Ordering::Relaxed);
        let done = ticks_to_nanos(longest & !KIND);
        if reading.phase == Some(Phase::Exit) && reading.stretch > done {
            return (last.unwrap_or("none"), reading.stretch);
        }
        (NAMES.get((longest & KIND) as usize).copied().unwrap_or("none"), done)
    }

    /// Whether somebody wants a glance at the vCPU; it is given with [`Account::give`].
    pub(crate) fn wants(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) && self.wanted.swap(false, Ordering::AcqRel)
    }

    /// Wants a glance: whoever asks kicks the engine then.
    pub(crate) fn want(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    /// What the vCPU is at.
    pub(crate) fn give(&self, glance: Glance) {
        *self.glance.lock().unwrap_or_else(PoisonError::into_inner) = Some(glance);
    }

    /// The glance that was given since this was last asked.
    pub(crate) fn take(&self) -> Option<Glance> {
        self.glance.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The vCPU goes to sleep, to be woken by interrupts or (not `open`) by NMI, INIT and SIPI alone.
    pub(crate) fn sleeps(&self, open: bool) {
        self.open.store(open, Ordering::Relaxed);
    }

    /// Whether an interrupt wakes the vCPU that sleeps.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// What the account says now.
    pub(crate) fn read(&self) -> Reading {
        let thread = || self.last.get().copied().or_else(|| self.thread.get().and_then(RunDelay::times));
        if self.closed.load(Ordering::Relaxed) {
            return Reading { thread: thread(), ..Reading::default() };
        }
        let mut spent = [0; PHASES];
        let since = loop {
            let since = self.since.load(Ordering::Acquire);
            for (to, from) in spent.iter_mut().zip(&self.spent) {
                *to = from.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if since & CHANGING == 0 && self.since.load(Ordering::Relaxed) == since {
                break since;
            }
            std::hint::spin_loop();
        };
        let stretch = host_ticks().saturating_sub(since & !PHASE);
        let phase = [Phase::Guest, Phase::Exit, Phase::Halted, Phase::Resting][(since & PHASE) as usize];
        spent[phase as usize] += stretch;
        Reading {
            spent: spent.map(ticks_to_nanos),
            phase: Some(phase),
            stretch: ticks_to_nanos(stretch),
            thread: thread(),
        }
    }

    /// The account in words.
    pub(crate) fn time_spent(&self) -> TimeSpent {
        TimeSpent::from(&self.read())
    }
}

/// Where the time of a vCPU's thread went, by the host's clock, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TimeSpent {
    /// In the engine, running guest code or waiting for the host to do so.
    pub guest_ns: u64,
    /// In devices and the rest of the machine.
    pub exits_ns: u64,
    /// Asleep in HLT.
    pub halted_ns: u64,
    /// Parked: paused, held by a debugger, not started.
    pub resting_ns: u64,
    /// The host's scheduler ran the thread.
    pub ran_ns: u64,
    /// The thread was runnable and the host did not run it: stolen time.
    pub delayed_ns: u64,
}

impl From<&Reading> for TimeSpent {
    fn from(reading: &Reading) -> TimeSpent {
        let spent = |phase: Phase| reading.spent[phase as usize].0;
        let thread = reading.thread.unwrap_or_default();
        TimeSpent {
            guest_ns: spent(Phase::Guest),
            exits_ns: spent(Phase::Exit),
            halted_ns: spent(Phase::Halted),
            resting_ns: spent(Phase::Resting),
            ran_ns: thread.ran.0,
            delayed_ns: thread.delayed.0,
        }
    }
}

impl std::ops::AddAssign for TimeSpent {
    fn add_assign(&mut self, more: TimeSpent) {
        self.guest_ns += more.guest_ns;
        self.exits_ns += more.exits_ns;
        self.halted_ns += more.halted_ns;
        self.resting_ns += more.resting_ns;
        self.ran_ns += more.ran_ns;
        self.delayed_ns += more.delayed_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::{Account, Phase};
    use crate::stats::Kind;
    use wardian_cpu::Glance;
    use wardian_time::{Nanos, host_ticks, ticks_to_nanos};

    #[test]
    fn every_stretch_is_in_one_phase() {
        let account = Account::default();
        account.begin();
        let begin = host_ticks();
        account.enter(Phase::Guest, begin);
        account.enter(Phase::Exit, begin + 8_000_000);
        account.enter(Phase::Halted, begin + 8_800_000);
        // Time that seems to run back (the clocks of two processors) adds nothing.
        account.enter(Phase::Guest, begin + 8_000);
        account.end();
        assert!(account.read().thread == account.last.get().copied());
        let reading = account.read();
        let spent = |phase: Phase| reading.spent[phase as usize];
        assert!(spent(Phase::Exit).0.abs_diff(ticks_to_nanos(800_000).0) < 100);
        assert!(spent(Phase::Guest) >= ticks_to_nanos(7_999_000));
        assert!(spent(Phase::Halted) < Nanos(100));
        assert_eq!(reading.phase, Some(Phase::Resting));
    }

    #[test]
    fn readers_never_count_a_stretch_twice() {
        let account = Account::default();
        let begin = host_ticks();
        account.enter(Phase::Guest, begin);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for round in 0..200_000u32 {
                    let phase = if round % 2 == 0 { Phase::Exit } else { Phase::Guest };
                    account.enter(phase, host_ticks());
                }
            });
            while !writer.is_finished() {
                let reading = account.read();
                let total = reading.spent[0].0 + reading.spent[1].0;
                let elapsed = ticks_to_nanos(host_ticks() - begin).0;
                assert!(total <= elapsed + 100, "{total} ns of {elapsed}");
            }
        });
    }

    #[test]
    fn the_longest_exit_and_the_glance_are_taken_once() {
        let account = Account::default();
        account.exit(Kind::PortIn, 4_000_000);
        account.exit(Kind::MmioWrite, 8_000_000);
        account.exit(Kind::PortOut, 4_000_000);
        let reading = account.read();
        let (name, long) = account.take_longest(&reading, None);
        assert_eq!((name, long), ("mmio-write", ticks_to_nanos(8_000_000)));
        assert_eq!(account.take_longest(&reading, None).1, Nanos(0));
        account.enter(Phase::Exit, host_ticks());
        std::thread::sleep(std::time::Duration::from_millis(5));
        let (name, long) = account.take_longest(&account.read(), Some("port-in"));
        assert!(name == "port-in" && long >= Nanos(4_900_000));

        assert!(!account.wants());
        account.want();
        assert!(account.wants() && !account.wants());
        account.give(Glance { rip: 5, ..Glance::default() });
        assert_eq!(account.take().map(|glance| glance.rip), Some(5));
        assert_eq!(account.take(), None);
    }
}
