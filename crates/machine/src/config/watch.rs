//! What a user says about pauses and lockups.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use wardian_time::{Nanos, ResumePolicy};

use super::{ConfigError, bad};

/// What guest time does about a pause: `freeze`, `advance`, or `step:` and a span such as `1.5s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnResume(pub ResumePolicy);

impl Default for OnResume {
    /// Guest clocks keep the host's time, as they do when the whole process is stopped.
    fn default() -> OnResume {
        OnResume(ResumePolicy::Advance)
    }
}

/// The longest step: a year.
const MAX_STEP: f64 = 366.0 * 86400.0;

/// A span: a number, then `ns`, `us`, `ms`, `s`, `m`, `h` or `d`.
fn span(text: &str) -> Option<Nanos> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let scale = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    let seconds = number.parse::<f64>().ok()? * scale;
    (0.0..=MAX_STEP).contains(&seconds).then_some(Nanos((seconds * 1e9) as u64))
}

impl FromStr for OnResume {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<OnResume, ConfigError> {
        let step = text.strip_prefix("step:");
        match text {
            "freeze" => Ok(OnResume(ResumePolicy::Freeze)),
            "advance" => Ok(OnResume(ResumePolicy::Advance)),
            _ => step.and_then(span).map(|by| OnResume(ResumePolicy::Step(by))).ok_or_else(|| {
                bad("policy for resuming", text, "give freeze, advance or step:SPAN, such as step:1.5s")
            }),
        }
    }
}

/// How long a vCPU may make no progress before somebody is told: seconds, or 0 for ever: then no account is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockupSeconds(pub u32);

impl Default for LockupSeconds {
    fn default() -> LockupSeconds {
        LockupSeconds(20)
    }
}

impl LockupSeconds {
    /// As a span, if there is one.
    #[must_use]
    pub fn span(self) -> Option<Duration> {
        (self.0 != 0).then(|| Duration::from_secs(self.0.into()))
    }
}

impl FromStr for LockupSeconds {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<LockupSeconds, ConfigError> {
        let seconds = text.trim().parse().ok().filter(|seconds| matches!(seconds, 0 | 3..=3600));
        seconds.map(LockupSeconds).ok_or_else(|| {
            bad("time without progress", text, "give 3 to 3600 seconds, or 0 to watch no vCPU")
        })
    }
}

by_text!(OnResume, "freeze, advance or \"step:SPAN\"");
by_text!(LockupSeconds, "a number of seconds");

#[cfg(test)]
mod tests {
    use super::{LockupSeconds, OnResume};
    use wardian_time::{Nanos, ResumePolicy};

    #[test]
    fn policies_and_spans() {
        for (text, want) in [
            ("freeze", Some(ResumePolicy::Freeze)),
            ("advance", Some(ResumePolicy::Advance)),
            ("step:1.5s", Some(ResumePolicy::Step(Nanos(1_500_000_000)))),
            ("step:20ms", Some(ResumePolicy::Step(Nanos(20_000_000)))),
            ("step:0s", Some(ResumePolicy::Step(Nanos(0)))),
            ("step:2h", Some(ResumePolicy::Step(Nanos(7_200_000_000_000)))),
            ("step:-1s", None),
            ("step:1", None),
            ("step:s", None),
            ("step:NaNs", None),
            ("step:400d", None),
            ("skip", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<OnResume>().ok().map(|policy| policy.0), want, "{text}");
        }
    }

    #[test]
    fn seconds_without_progress() {
        assert_eq!(LockupSeconds::default().span().map(|span| span.as_secs()), Some(20));
        assert_eq!("0".parse::<LockupSeconds>().unwrap().span(), None);
        for text in ["1", "3601", "-1", "x"] {
            assert!(text.parse::<LockupSeconds>().is_err(), "{text}");
        }
    }
}
