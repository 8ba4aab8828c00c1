//! What is saved of a [`TimeBase`]: where guest time stands.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use wardian_state::{Record, Refused};

use super::{Source, TimeBase, TimeConfig, TscMode};
use crate::{Nanos, host};

/// How much the measured rates of one host's TSC may differ between two processes, in parts per million.
const TOLERANCE_PPM: u64 = 200;
/// No time line is longer: what is added to it does not overflow.
const MAX_TICKS: u64 = 1 << 62;

/// A stopped [`TimeBase`] as it is saved. It is its own unit: TSC ticks since guest time 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeState {
    /// Whether guest time is the count of retired instructions.
    pub counted: bool,
    /// Rate of the guest TSC in Hz.
    pub tsc_hz: u64,
    /// How the guest TSC relates to the host's: default, emulate or native.
    pub tsc_mode: String,
    /// The time line.
    pub line_ticks: u64,
    /// How far guest clocks are behind it.
    pub lag_ticks: u64,
    /// The latest reading that a guest made, where readings are noted.
    pub latest_ticks: Option<u64>,
    /// Wall clock at guest time 0, in ns since the epoch.
    pub wall_at_zero_ns: u64,
    /// Host wall clock when guest time stopped.
    pub stopped_wall_ns: u64,
}

impl Record for TimeState {
    const KIND: &'static str = "time";
    const VERSION: u16 = 1;
}

fn name(mode: TscMode) -> &'static str {
    match mode {
        TscMode::Default => "default",
        TscMode::Emulate => "emulate",
        TscMode::Native => "native",
    }
}

impl TimeBase {
    /// What to save; guest time stands still.
    ///
    /// # Errors
    /// While it runs: there is no one moment that would be saved.
    pub fn save(&self) -> Result<TimeState, Refused> {
        Refused::unless::<TimeState>(!self.is_running(), "guest time runs")?;
        let (line_ticks, stopped) = *self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(TimeState {
            counted: self.is_counted(),
            tsc_hz: self.hz,
            tsc_mode: name(self.mode).to_owned(),
            line_ticks,
            lag_ticks: self.lag.load(Ordering::Acquire),
            latest_ticks: self.latest.as_ref().map(|latest| latest.load(Ordering::Acquire)),
            wall_at_zero_ns: self.wall_at_zero.load(Ordering::Acquire),
            stopped_wall_ns: stopped.0,
        })
    }

    /// The base that was saved as `state`, stopped where it stopped. What guest time does about the time that has
    /// passed since, [`TimeBase::resume`] is told.
    ///
    /// The guest's TSC goes on at the rate that the guest knows, as far as this host's is the same.
    ///
    /// # Errors
    /// When this host's rate is another, when `config` is another, or when no base can be in that state.
    pub fn restore(config: TimeConfig, state: &TimeState) -> Result<Arc<TimeBase>, Refused> {
        let host_hz = if state.counted { Nanos::SECOND.0 } else { host::tsc_hz() };
        Self::restore_at(config, state, host_hz)
    }

    fn restore_at(config: TimeConfig, state: &TimeState, host_hz: u64) -> Result<Arc<TimeBase>, Refused> {
        let refuse = Refused::new::<TimeState>;
        let off = host_hz.abs_diff(state.tsc_hz);
        if u128::from(off) * 1_000_000 > u128::from(host_hz) * u128::from(TOLERANCE_PPM) {
            return Err(refuse(format!(
                "the guest's TSC runs at {} Hz, this host's at {host_hz} Hz",
                state.tsc_hz
            )));
        }
        if state.tsc_mode != name(config.tsc) {
            return Err(refuse(format!("it has TSC mode {}, not {}", state.tsc_mode, name(config.tsc))));
        }
        let latest = state.latest_ticks.unwrap_or(0);
        let lengths = [state.line_ticks, latest, state.wall_at_zero_ns, state.stopped_wall_ns];
        if lengths.into_iter().any(|length| length > MAX_TICKS) || state.lag_ticks > state.line_ticks {
            return Err(refuse("a time is out of range".to_owned()));
        }
        let source = if state.counted { Source::Counted(AtomicU64::new(0)) } else { Source::Tsc };
        let mut base = Self::make(source, state.tsc_hz, Nanos(state.wall_at_zero_ns), config);
        if base.latest.is_some() != state.latest_ticks.is_some() {
            return Err(refuse("its timers have other policies".to_owned()));
        }
        base.lag = AtomicU64::new(state.lag_ticks);
        base.latest = state.latest_ticks.map(AtomicU64::new);
        *base.paused.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner) =
            (state.line_ticks, Nanos(state.stopped_wall_ns));
        Ok(Arc::new(base))
    }
}

#[cfg(test)]
mod tests {
    use super::{TimeBase, TimeState};
    use crate::{Nanos, ResumePolicy, TimeConfig, TscMode};

    fn counted() -> TimeState {
        let base = TimeBase::counted(Nanos(5), TimeConfig::default());
        base.resume(ResumePolicy::Freeze);
        base.advance(Nanos(1_000_000));
        base.save().unwrap_err();
        base.pause();
        base.save().unwrap()
    }

    #[test]
    fn time_goes_on_where_it_stopped() {
        let state = counted();
        assert_eq!((state.line_ticks, state.wall_at_zero_ns), (1_000_000, 5));
        let base = TimeBase::restore(TimeConfig::default(), &state).unwrap();
        assert!(!base.is_running() && base.is_counted());
        assert_eq!(
            (base.now(), base.timeline(), base.tsc()),
            (Nanos(1_000_000), Nanos(1_000_000), 1_000_000)
        );
        assert_eq!(base.save().unwrap(), state);
        base.resume(ResumePolicy::Step(Nanos(7)));
        base.advance(Nanos(3));
        assert_eq!(base.now(), Nanos(1_000_010));
        assert_eq!(base.wall(), Nanos(1_000_015));
    }

    #[test]
    fn a_host_base_keeps_its_rate_and_advances_by_the_wall_clock() {
        let base = TimeBase::host();
        base.resume(ResumePolicy::Freeze);
        base.pause();
        let mut state = base.save().unwrap();
        state.tsc_hz += 10_000; // as another process may measure it
        state.stopped_wall_ns -= 3_000_000_000;
        let at = TimeBase::restore(TimeConfig::default(), &state).unwrap();
        assert_eq!(at.tsc_hz(), state.tsc_hz);
        let before = at.now();
        at.resume(ResumePolicy::Advance);
        let moved = at.now().saturating_sub(before);
        assert!((3_000_000_000..4_000_000_000).contains(&moved.0), "{moved:?}");

        let frozen = TimeBase::restore(TimeConfig::default(), &state).unwrap();
        frozen.resume(ResumePolicy::Freeze);
        assert!(frozen.now().saturating_sub(before).0 < 1_000_000_000);
        assert!(frozen.now() >= before);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = counted();
        let refused = |config, change: &dyn Fn(&mut TimeState)| {
            let mut state = good.clone();
            change(&mut state);
            TimeBase::restore(config, &state).unwrap_err().to_string()
        };
        let plain = TimeConfig::default();
        assert!(refused(plain, &|s| s.tsc_hz = 2_000_000_000).contains("2000000000 Hz"));
        assert!(refused(TimeConfig { tsc: TscMode::Emulate, ..plain }, &|_| ()).contains("emulate"));
        assert!(refused(TimeConfig { may_lag: true, ..plain }, &|_| ()).contains("policies"));
        assert!(refused(plain, &|s| s.lag_ticks = 1_000_001).contains("out of range"));
        assert!(refused(plain, &|s| s.line_ticks = u64::MAX).contains("out of range"));
        refused(plain, &|s| s.tsc_mode = String::new());
    }
}
