//! How a machine's timers keep time, as a user says it.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use wardian_time::{TickConfig, TickPolicy, TimeConfig, TscMode};

use super::{ConfigError, bad};

/// What becomes of ticks that the guest could not take in time: a policy for all timers, and for some
/// devices another. Written `late-one`, `pit=replay`, or several of those with commas between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerPolicies {
    all: Option<TickPolicy>,
    pit: Option<TickPolicy>,
    rtc: Option<TickPolicy>,
    hpet: Option<TickPolicy>,
    lapic: Option<TickPolicy>,
}

/// The policy of each timer device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timers {
    /// 8254 channel 0.
    pub pit: TickConfig,
    /// MC146818 periodic interrupt.
    pub rtc: TickConfig,
    /// HPET timers.
    pub hpet: TickConfig,
    /// Local APIC timers.
    pub lapic: TickConfig,
}

impl TimerPolicies {
    /// What `over` says, and what this says where `over` is silent.
    #[must_use]
    pub fn overridden_by(self, over: TimerPolicies) -> TimerPolicies {
        // A policy for all timers replaces what was said of single ones before.
        let below = if over.all.is_some() { TimerPolicies::default() } else { self };
        TimerPolicies {
            all: over.all.or(below.all),
            pit: over.pit.or(below.pit),
            rtc: over.rtc.or(below.rtc),
            hpet: over.hpet.or(below.hpet),
            lapic: over.lapic.or(below.lapic),
        }
    }

    /// The policy of each device.
    #[must_use]
    pub fn resolve(self, align: bool) -> Timers {
        let of = |own: Option<TickPolicy>| TickConfig { policy: own.or(self.all).unwrap_or_default(), align };
        Timers { pit: of(self.pit), rtc: of(self.rtc), hpet: of(self.hpet), lapic: of(self.lapic) }
    }
}

impl Timers {
    /// What the time base must be able to do for these.
    #[must_use]
    pub fn time_config(&self, tsc: TscMode) -> TimeConfig {
        let all = [self.pit, self.rtc, self.hpet, self.lapic];
        TimeConfig { tsc, may_lag: all.iter().any(|config| config.policy == TickPolicy::Delay) }
    }
}

impl FromStr for TimerPolicies {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<TimerPolicies, ConfigError> {
        let what = "timer policy";
        let mut policies = TimerPolicies::default();
        for word in text.split(',') {
            let (device, name) = word.split_once('=').map_or((None, word), |(d, n)| (Some(d), n));
            let policy: TickPolicy =
                name.parse().map_err(|e: wardian_time::UnknownPolicy| bad(what, text, e.to_string()))?;
            let place = match device {
                None => &mut policies.all,
                Some("pit") => &mut policies.pit,
                Some("rtc") => &mut policies.rtc,
                Some("hpet") => &mut policies.hpet,
                Some("lapic") => &mut policies.lapic,
                Some(other) => {
                    return Err(bad(
                        what,
                        text,
                        format!("'{other}' is no timer; pit, rtc, hpet and lapic are"),
                    ));
                }
            };
            if place.replace(policy).is_some() {
                return Err(bad(what, text, format!("'{word}' says again what was said before")));
            }
        }
        Ok(policies)
    }
}

/// How the guest's time-stamp counter relates to the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TscModeArg(pub TscMode);

impl FromStr for TscModeArg {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<TscModeArg, ConfigError> {
        match text {
            "default" => Ok(TscModeArg(TscMode::Default)),
            "emulate" => Ok(TscModeArg(TscMode::Emulate)),
            "native" => Ok(TscModeArg(TscMode::Native)),
            _ => Err(bad("TSC mode", text, "give default, emulate or native")),
        }
    }
}

/// What guest time follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeSource {
    /// The host's clock.
    Host,
    /// The instructions that the guest retires.
    Virtual,
}

impl FromStr for TimeSource {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<TimeSource, ConfigError> {
        match text {
            "host" => Ok(TimeSource::Host),
            "virtual" => Ok(TimeSource::Virtual),
            _ => Err(bad("source of guest time", text, "give host or virtual")),
        }
    }
}

by_text!(TimeSource, "host or virtual");
by_text!(TimerPolicies, "a timer policy such as \"late-one\" or \"replay,rtc=replay-slew\"");
by_text!(TscModeArg, "default, emulate or native");

#[cfg(test)]
mod tests {
    use super::{TimerPolicies, TscModeArg};
    use wardian_time::{TickPolicy, TscMode};

    #[test]
    fn devices_differ_from_the_rest() {
        let policies: TimerPolicies = "sync,rtc=replay-slew".parse().unwrap();
        let timers = policies.resolve(true);
        assert_eq!((timers.pit.policy, timers.rtc.policy), (TickPolicy::Sync, TickPolicy::ReplaySlew));
        assert!(timers.lapic.align && !timers.time_config(TscMode::Default).may_lag);
        let over = policies.overridden_by("hpet=delay".parse().unwrap()).resolve(false);
        assert_eq!((over.hpet.policy, over.rtc.policy), (TickPolicy::Delay, TickPolicy::ReplaySlew));
        assert!(over.time_config(TscMode::Default).may_lag);
        let all = policies.overridden_by("replay".parse().unwrap()).resolve(false);
        assert_eq!(all.rtc.policy, TickPolicy::Replay);
        assert_eq!(TimerPolicies::default().resolve(false).lapic.policy, TickPolicy::LateOne);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, want) in [
            ("sunc", "There is no timer policy \"sunc\""),
            ("pic=sync", "'pic' is no timer; pit, rtc, hpet and lapic are"),
            ("sync,replay", "'replay' says again"),
            ("", "no timer policy"),
        ] {
            let error = text.parse::<TimerPolicies>().unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        assert!("fast".parse::<TscModeArg>().is_err());
    }
}
