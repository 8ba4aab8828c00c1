//! The lockup doctor: once a second it looks at every vCPU's account, and says why one makes no progress.
//!
//! Its thread is also the heartbeat of the process ([`wardian_time::Pulse`]): who finds it late by far knows that
//! the whole process was stopped. It disturbs the guest by one kick a second of each vCPU that computes.
//!
//! Lock order: it holds no lock while it calls others.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use wardian_cpu::Glance;
use wardian_irq::Kick;
use wardian_time::{Beat, Heart, Nanos, TimerQueue};

use crate::accounts::{Phase, Reading};
use crate::diary::{Diary, Happening, seconds};
use crate::vcpu::Slot;
use crate::verdict::{Sighting, Verdict, Window, explain, is_loud, judge};

/// From beat to beat, and a little more: see [`beat`].
const BEAT: Duration = Duration::from_secs(1);
/// At most that.
const STRAY: u64 = 10_000_000;

/// How long beat number `count` waits. Guests tick in even parts of a second too: beats that kept step with them would
/// see nothing but the handler of the tick. The golden ratio's multiples spread evenly.
fn beat(count: u64) -> Duration {
    let part = count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    BEAT + Duration::from_nanos((part * STRAY) >> 32)
}

/// How the doctor's thread is told to stop.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    /// The doctor may go.
    pub(crate) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for so long; false: it was rung.
    fn wait(&self, span: Duration) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(rung, span, |rung| !*rung);
        !*waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What is known of a vCPU at one beat: sums since the start, and what happened since the beat before.
#[derive(Clone, Debug, Default)]
struct Sample {
    /// Host time.
    at: Nanos,
    reading: Reading,
    stopped: Nanos,
    masked: Nanos,
    unwoken: Nanos,
    interrupts: u64,
    longest_exit: (&'static str, Nanos),
    timer_late: Nanos,
    doctor_late: Nanos,
    clock_step: Nanos,
    looked: bool,
    sighting: Option<Sighting>,
}

/// What the vCPU was told to make no progress for.
struct Episode {
    verdict: Verdict,
    began: Nanos,
}

#[derive(Default)]
struct Patient {
    /// The window, oldest first.
    samples: VecDeque<Sample>,
    episode: Option<Episode>,
    /// The last verdict and when it was over: it is not told again at once.
    last: Option<(Verdict, Nanos)>,
    interrupts: u64,
    masked: Nanos,
    unwoken: Nanos,
    /// At the last beat it slept and something to wake it was there.
    awaited: bool,
    asked: bool,
}

/// The doctor of one life of the machine.
pub(crate) struct Doctor<'a> {
    pub(crate) slots: &'a [Slot],
    pub(crate) queue: &'a TimerQueue,
    pub(crate) diary: &'a Arc<Diary>,
    /// Length of the window; `None`: only the heart beats.
    pub(crate) window: Option<Duration>,
}

/// What all vCPUs have in common at one beat.
#[derive(Clone, Copy, Default)]
struct Common {
    at: Nanos,
    beat: Beat,
    stopped: Nanos,
    timer_late: Nanos,
    clock_step: Nanos,
}

impl Doctor<'_> {
    /// Works until the bell is rung.
    pub(crate) fn work(&self, bell: &Bell) {
        let base = self.queue.base();
        // Guest time that does not follow the host's clock does not jump when the process was stopped.
        let follows = base.follows_host();
        let mut heart = Heart::start(base.pulse());
        if !follows {
            base.pulse().still();
        }
        let mut patients: Vec<Patient> = self.slots.iter().map(|_| Patient::default()).collect();
        let mut common = Common::default();
        let mut clock = None;
        let mut beats = 0..;
        while bell.wait(beat(beats.next().unwrap_or(0))) {
            let beat = heart.beat(base.pulse());
            if !follows {
                base.pulse().still();
            }
            let gone = beat.elapsed();
            if beat.stopped {
                self.tell_stop(gone, beat.suspended);
                common.stopped = common.stopped.saturating_add(gone);
            }
            common.at = common.at.saturating_add(gone);
            common.beat = beat;
            common.timer_late = self.queue.take_lateness();
            common.clock_step = step(&mut clock, follows && base.is_running(), base.timeline(), beat.since);
            if let Some(window) = self.window {
                let window = Nanos(window.as_nanos() as u64);
                for (slot, patient) in self.slots.iter().zip(&mut patients) {
                    patient.look(slot, &common, window);
                }
                self.judge(&mut patients, window, common.at);
            }
        }
        base.pulse().still();
    }

    fn tell_stop(&self, gone: Nanos, suspended: Nanos) {
        let who = if suspended.0 != 0 { "The host was suspended" } else { "The process was stopped" };
        let text = format!("{who} for about {:.0} s; the guest is told", gone.0 as f64 / 1e9);
        let what = Happening::Stopped { stopped_ns: gone.0, suspended_ns: suspended.0 };
        self.diary.tell(self.queue.base().now(), true, text, what);
    }

    fn judge(&self, patients: &mut [Patient], window: Nanos, now: Nanos) {
        let mut windows: Vec<Option<Window>> = patients.iter().map(|p| p.window(window)).collect();
        let starved: Vec<Option<u64>> = windows
            .iter()
            .map(|w| w.as_ref().map(Window::unrun_ns).filter(|ns| *ns > window.0 / 2))
            .collect();
        for (vcpu, patient) in patients.iter_mut().enumerate() {
            let Some(mut evidence) = windows[vcpu].take() else { continue };
            let siblings = starved.iter().enumerate().filter(|(other, _)| *other != vcpu);
            evidence.starved_sibling = siblings.filter_map(|(other, ns)| Some((other, (*ns)?))).next();
            let verdict = judge(&evidence);
            let (loud, what) = match patient.turn(verdict, now, window) {
                Turn::Nothing => continue,
                Turn::Over(after) => {
                    let text = format!("vCPU {vcpu} makes progress again after {}", seconds(after));
                    self.diary.tell(
                        self.queue.base().now(),
                        false,
                        text,
                        Happening::Progress { vcpu, after_ns: after.0 },
                    );
                    continue;
                }
                Turn::New(verdict) => {
                    if verdict == Verdict::LostWakeup {
                        self.slots[vcpu].wake.kick();
                    }
                    (is_loud(&verdict, &evidence), (explain(vcpu, &verdict, &evidence), verdict))
                }
            };
            let (text, verdict) = what;
            let what = Happening::NoProgress { vcpu, verdict, evidence: Box::new(evidence) };
            self.diary.tell(self.queue.base().now(), loud, text, what);
        }
    }
}

/// How far guest time ran away from the host's clock since the last beat, while guest time ran.
fn step(last: &mut Option<Nanos>, running: bool, guest: Nanos, host: Nanos) -> Nanos {
    let before = last.replace(guest).filter(|_| running);
    if !running {
        *last = None;
    }
    before.map_or(Nanos(0), |before| Nanos((guest.0.wrapping_sub(before.0)).abs_diff(host.0)))
}

enum Turn {
    Nothing,
    New(Verdict),
    /// It is over, and was so long.
    Over(Nanos),
}

impl Patient {
    /// Adds a sample, and asks for the next look at guest code.
    fn look(&mut self, slot: &Slot, common: &Common, window: Nanos) {
        let account = &slot.account;
        let reading = account.read();
        let pending = slot.local.pending();
        let glance = account.take();
        let sighting = glance.map(|glance: Glance| Sighting {
            rip: glance.rip,
            user: glance.user,
            interrupts_enabled: glance.interrupts_enabled,
            interrupt_pending: pending.interrupt,
        });
        let span = common.beat.since;
        let halted = reading.phase == Some(Phase::Halted);
        let awaited =
            halted && reading.stretch >= span && (pending.interrupt && account.is_open() || pending.nmi);
        let before = self.interrupts;
        self.interrupts = glance.map_or(before, |glance| glance.interrupts);
        if sighting.is_some_and(|seen| !seen.interrupts_enabled && seen.interrupt_pending)
            && self.interrupts == before
        {
            self.masked = self.masked.saturating_add(span);
        }
        if awaited && self.awaited {
            self.unwoken = self.unwoken.saturating_add(span);
        }
        self.awaited = awaited;
        // Timers are late and clocks move when a pause or a stop is over: that is no fault.
        let rest = |reading: &Reading| reading.spent[Phase::Resting as usize];
        let disturbed = self
            .samples
            .back()
            .is_none_or(|last| rest(&reading) != rest(&last.reading) || common.stopped != last.stopped);
        let unless_disturbed = |span| if disturbed { Nanos(0) } else { span };
        let longest = account.take_longest(&reading, slot.last_exit());
        let guest = reading.phase == Some(Phase::Guest);
        self.samples.push_back(Sample {
            at: common.at,
            reading,
            stopped: common.stopped,
            masked: self.masked,
            unwoken: self.unwoken,
            interrupts: self.interrupts,
            longest_exit: longest,
            timer_late: unless_disturbed(common.timer_late),
            doctor_late: span.saturating_sub(Nanos(BEAT.as_nanos() as u64)),
            clock_step: unless_disturbed(common.clock_step),
            looked: self.asked,
            sighting,
        });
        while self.samples.len() > 2 && common.at.saturating_sub(self.samples[1].at) >= window {
            self.samples.pop_front();
        }
        // A vCPU that sleeps is left alone.
        self.asked = guest;
        if guest {
            account.want();
            slot.wake.kick_engine();
        }
    }

    /// The window of length `span`, once there is one.
    fn window(&self, span: Nanos) -> Option<Window> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        if last.at.saturating_sub(first.at) < span {
            return None;
        }
        let during = || self.samples.iter().skip(1);
        let spent = |phase: Phase| {
            last.reading.spent[phase as usize].saturating_sub(first.reading.spent[phase as usize]).0
        };
        let thread = |f: fn(&wardian_time::ThreadTime) -> Nanos| {
            let (new, old) = (last.reading.thread.as_ref()?, first.reading.thread.as_ref());
            Some(f(new).saturating_sub(old.map_or(Nanos(0), f)).0)
        };
        let most = |f: fn(&Sample) -> Nanos| during().map(f).max().unwrap_or_default().0;
        let longest =
            during().map(|sample| sample.longest_exit).max_by_key(|exit| exit.1).unwrap_or_default();
        Some(Window {
            span_ns: last.at.saturating_sub(first.at).0,
            guest_ns: spent(Phase::Guest),
            exits_ns: spent(Phase::Exit),
            halted_ns: spent(Phase::Halted),
            resting_ns: spent(Phase::Resting),
            stopped_ns: last.stopped.saturating_sub(first.stopped).0,
            ran_ns: thread(|time| time.ran),
            delayed_ns: thread(|time| time.delayed).unwrap_or(0),
            longest_exit: longest.0,
            longest_exit_ns: longest.1.0,
            timer_late_ns: most(|sample| sample.timer_late),
            doctor_late_ns: most(|sample| sample.doctor_late),
            masked_ns: last.masked.saturating_sub(first.masked).0,
            unwoken_ns: last.unwoken.saturating_sub(first.unwoken).0,
            interrupts: last.interrupts.saturating_sub(first.interrupts),
            clock_step_ns: most(|sample| sample.clock_step),
            looks: during().filter(|sample| sample.looked).count(),
            sightings: during().filter_map(|sample| sample.sighting).collect(),
            starved_sibling: None,
        })
    }

    /// What is new about the vCPU, now that the verdict is this.
    fn turn(&mut self, verdict: Option<Verdict>, now: Nanos, window: Nanos) -> Turn {
        match (&self.episode, verdict) {
            (None, None) => Turn::Nothing,
            (Some(episode), Some(verdict)) if episode.verdict.is_like(&verdict) => Turn::Nothing,
            (_, Some(verdict)) => {
                let again = self
                    .last
                    .as_ref()
                    .is_some_and(|(last, over)| last.is_like(&verdict) && now.saturating_sub(*over) < window);
                self.episode = Some(Episode { verdict: verdict.clone(), began: now.saturating_sub(window) });
                if again { Turn::Nothing } else { Turn::New(verdict) }
            }
            (Some(_), None) => match self.episode.take() {
                Some(Episode { verdict, began }) => {
                    self.last = Some((verdict, now));
                    Turn::Over(now.saturating_sub(began))
                }
                None => Turn::Nothing,
            },
        }
    }
}

#[cfg(test)]
mod tests;
