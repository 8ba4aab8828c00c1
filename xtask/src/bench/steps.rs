//! What is measured: the steps of `steps.sh`, and how long each took by the console of a run.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::vm::{Line, MARKER};

/// The small programs of the script, in C.
pub const PROGRAMS: &str = include_str!("steps.c");

/// The script; it takes the names of the steps to run.
pub const SCRIPT: &str = include_str!("steps.sh");

/// A step of the script.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    pub name: &'static str,
    /// Whether `bench boot` has it.
    pub gate: bool,
    /// Its class in the whole bench, when it is there.
    pub class: Option<&'static str>,
    /// vCPUs in the whole bench.
    pub cpus: u32,
    /// How often over in the whole bench.
    pub times: u32,
    /// What it does, in a few words.
    pub what: &'static str,
}

/// All steps, in the order of the script.
pub fn all() -> Vec<Step> {
    SCRIPT
        .lines()
        .filter_map(|line| line.strip_prefix("step_")?.split_once("() { # "))
        .filter_map(|(name, told)| {
            let (kinds, what) = told.split_once(": ")?;
            let words = || kinds.split(' ');
            Some(Step {
                name,
                gate: words().any(|word| word == "gate"),
                class: words().find(|word| {
                    !word.is_empty() && *word != "gate" && word.bytes().all(|b| b.is_ascii_lowercase())
                }),
                cpus: if words().any(|word| word == "2") { 2 } else { 1 },
                times: words().filter_map(|word| word.strip_prefix('x')?.parse().ok()).next().unwrap_or(1),
                what,
            })
        })
        .collect()
}

/// How long something took in one run, in seconds.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Times {
    /// By the host's clock, from marker to marker on the console.
    pub host: f64,
    /// By the guest's own clock.
    pub guest: f64,
    /// CPU time of the whole VMM process, by hundredths of a second.
    pub cpu: Option<f64>,
}

/// One run, measured.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// From the start of the process to the init script; `guest` is the guest's uptime then.
    pub boot: Option<Times>,
    pub steps: BTreeMap<String, Times>,
    /// Sum of what each step printed.
    pub sums: BTreeMap<String, String>,
    /// Steps that failed.
    pub failed: Vec<String>,
}

/// Reads the console of a run.
pub fn measure(lines: &[Line]) -> Measured {
    let mut measured = Measured::default();
    let mut open: Option<(&str, &Line, f64)> = None;
    for line in lines {
        let Some((_, text)) = line.text.split_once(MARKER) else { continue };
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        match words[..] {
            ["INIT", uptime] => {
                if let Ok(guest) = uptime.parse() {
                    measured.boot =
                        Some(Times { host: line.at.as_secs_f64(), guest, cpu: seconds(line.cpu) });
                }
            }
            ["BEGIN", name, clock] => open = clock.parse().ok().map(|clock| (name, line, clock)),
            ["END", name, clock, status] => {
                let Some((begun, begin, from)) = open.take() else { continue };
                let Ok(to) = clock.parse::<f64>() else { continue };
                if begun != name || status != "0" {
                    measured.failed.push(name.to_owned());
                    continue;
                }
                let times = Times {
                    host: line.at.saturating_sub(begin.at).as_secs_f64(),
                    guest: to - from,
                    cpu: seconds(line.cpu).zip(seconds(begin.cpu)).map(|(to, from)| to - from),
                };
                measured.steps.insert(name.to_owned(), times);
            }
            ["SUM", name, sum] => {
                measured.sums.insert(name.to_owned(), sum.to_owned());
            }
            _ => {}
        }
    }
    measured
}

fn seconds(time: Option<Duration>) -> Option<f64> {
    time.map(|time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_the_script() {
        let steps = all();
        assert_eq!(steps[0].name, "python3");
        assert_eq!(steps[1].name, "gcc");
        assert!(steps.iter().all(|step| !step.what.is_empty()));
        assert!(steps.iter().all(|step| step.gate || step.class.is_some()));
        let two: Vec<&str> = steps.iter().filter(|step| step.cpus == 2).map(|step| step.name).collect();
        assert_eq!(two, ["futex", "pair", "build"]);
        let perl = steps.iter().find(|step| step.name == "perl").expect("there is a row perl");
        assert_eq!((perl.gate, perl.class, perl.times), (true, Some("user"), 3));
        assert_eq!(steps.iter().find(|step| step.name == "7z").map(|step| step.class), Some(Some("user")));
        let functions = SCRIPT.lines().filter(|line| line.starts_with("step_")).count();
        assert_eq!(steps.len(), functions, "a step without a description");
    }

    #[test]
    fn console_to_times() {
        let line = |ms: u64, text: &str| Line {
            at: Duration::from_millis(ms),
            cpu: Some(Duration::from_millis(ms / 2)),
            text: text.to_owned(),
        };
        let measured = measure(&[
            line(10, "[    0.000000] Linux"),
            line(1300, "WARDIAN-INIT 1.05"),
            line(2000, "WARDIAN-BEGIN gcc 100.250000"),
            line(2500, "[   12.0] noise WARDIAN-END gcc 100.750000 0"),
            line(2510, "WARDIAN-SUM gcc 4711"),
            line(3000, "WARDIAN-BEGIN perl 101.0"),
            line(3100, "WARDIAN-END perl 101.1 2"),
            line(3200, "WARDIAN-END node 101.1 0"),
        ]);
        assert_eq!(measured.boot, Some(Times { host: 1.3, guest: 1.05, cpu: Some(0.65) }));
        assert_eq!(measured.steps.len(), 1);
        assert_eq!(measured.steps["gcc"], Times { host: 0.5, guest: 0.5, cpu: Some(0.25) });
        assert_eq!(measured.sums["gcc"], "4711");
        assert_eq!(measured.failed, ["perl"]);
    }
}
