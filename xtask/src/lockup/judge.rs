//! What a guest's kernel and the doctor said, beside what they were to say.

use std::collections::BTreeMap;

use serde::Serialize;

/// A complaint of the guest's kernel that something is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Complaint {
    SoftLockup,
    HardLockup,
    RcuStall,
    HungTask,
    /// Clocks run apart.
    Clock,
    /// A clock could not be read without an interruption, several times in a row: the host is busy.
    SlowClock,
}

impl Complaint {
    /// The complaint in a line of the console.
    pub fn of(line: &str) -> Option<Complaint> {
        let has = |text: &str| line.contains(text);
        if has("BUG: soft lockup") || has("BUG: workqueue lockup") {
            Some(Complaint::SoftLockup)
        } else if has("hard LOCKUP") {
            Some(Complaint::HardLockup)
        } else if has("rcu: INFO:") && has("stall") {
            Some(Complaint::RcuStall)
        } else if has("blocked for more than") {
            Some(Complaint::HungTask)
        } else if has("read-back delay") {
            Some(Complaint::SlowClock)
        } else if has("Marking clocksource") || has("timekeeping watchdog") {
            Some(Complaint::Clock)
        } else {
            None
        }
    }
}

/// What is to be said in a cell, and what may be.
#[derive(Clone, Copy)]
pub struct Expected {
    /// One of these must be there, if there are any; no other may.
    pub complaints: &'static [Complaint],
    /// Causes that the doctor must name.
    pub causes: &'static [&'static str],
    /// Causes that it may name besides, for what the host does in any cell.
    pub allowed: &'static [&'static str],
}

/// What was said.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Said {
    /// Lines of the guest's kernel that complain.
    pub complaints: Vec<(Complaint, String)>,
    /// How often the doctor named which cause.
    pub causes: BTreeMap<String, usize>,
    /// Its lines.
    pub lines: Vec<String>,
    /// The process was stopped, or the machine paused, by the events.
    pub stops: usize,
    pub pauses: usize,
}

impl Said {
    /// Reads a console, and the events as JSON lines.
    pub fn read(console: &[String], events: &str) -> Said {
        let mut said = Said::default();
        for line in console {
            if let Some(complaint) = Complaint::of(line) {
                said.complaints.push((complaint, line.clone()));
            }
        }
        let events = events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        for event in events {
            match event["event"].as_str() {
                Some("no-progress") => {
                    let cause = event["verdict"]["cause"].as_str().unwrap_or("?").to_owned();
                    *said.causes.entry(cause).or_default() += 1;
                    said.lines.extend(event["text"].as_str().map(str::to_owned));
                }
                Some("stopped") => said.stops += 1,
                Some("paused") => said.pauses += 1,
                _ => {}
            }
        }
        said
    }

    /// What is not as expected.
    pub fn faults(&self, expected: &Expected) -> Vec<String> {
        let mut faults = Vec::new();
        // Excused where the doctor saw that the host was busy.
        let excused = |complaint| complaint == Complaint::SlowClock && self.causes.contains_key("steal");
        for (complaint, line) in &self.complaints {
            if !expected.complaints.contains(complaint) && !excused(*complaint) {
                faults.push(format!("the guest should not say: {}", line.trim()));
            }
        }
        let had = |complaint: &Complaint| self.complaints.iter().any(|(had, _)| had == complaint);
        if !expected.complaints.is_empty() && !expected.complaints.iter().any(had) {
            faults.push(format!("the guest says nothing, but should one of {:?}", expected.complaints));
        }
        for cause in expected.causes {
            if !self.causes.contains_key(*cause) {
                faults.push(format!("the doctor does not say '{cause}'"));
            }
        }
        for cause in self.causes.keys().map(String::as_str) {
            if !expected.causes.contains(&cause) && !expected.allowed.contains(&cause) {
                let line = self.lines.iter().find(|line| !line.is_empty());
                faults.push(format!("the doctor says '{cause}', such as: {}", line.map_or("", |l| l)));
            }
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::{Complaint, Expected, Said};

    const SPIN: Expected =
        Expected { complaints: &[Complaint::SoftLockup], causes: &["spin"], allowed: &["steal"] };
    const NOTHING: Expected = Expected { complaints: &[], causes: &["stopped"], allowed: &["steal"] };

    #[test]
    fn lines_and_events_are_read() {
        let console: Vec<String> = [
            "[   24.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [insmod:118]",
            "[   25.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[    0.1] rcu: Hierarchical SRCU implementation.",
            "[    9.1] INFO: task dd:5 blocked for more than 120 seconds.",
        ]
        .map(str::to_owned)
        .into();
        let events = "{\"event\":\"no-progress\",\"text\":\"a\",\"verdict\":{\"cause\":\"spin\"}}\n\
                      {\"event\":\"stopped\"}\nnonsense\n\
                      {\"event\":\"no-progress\",\"text\":\"b\",\"verdict\":{\"cause\":\"spin\"}}\n";
        let said = Said::read(&console, events);
        let kinds: Vec<Complaint> = said.complaints.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Complaint::SoftLockup, Complaint::RcuStall, Complaint::HungTask]);
        assert_eq!((said.causes["spin"], said.stops, said.lines.len()), (2, 1, 2));
        assert_eq!(said.faults(&SPIN).len(), 2, "a stall and a hung task that are not to be there");
        assert_eq!(said.faults(&NOTHING).len(), 5, "three lines, a cause too many, one too few");
    }

    #[test]
    fn a_clock_that_reads_slowly_is_excused_on_a_busy_host_only() {
        let line = "[ 48.1] clocksource: timekeeping watchdog on CPU1: kvm-clock read-back delay of 246909ns, attempt 2";
        let mut said = Said::read(&[line.to_owned()], "");
        let quiet = Expected { complaints: &[], causes: &[], allowed: &["steal"] };
        assert_eq!(said.faults(&quiet).len(), 1);
        said.causes.insert("steal".to_owned(), 1);
        assert!(said.faults(&quiet).is_empty());
    }

    #[test]
    fn silence_is_a_fault_where_something_is_to_be_said() {
        let said = Said::default();
        assert_eq!(said.faults(&SPIN).len(), 2);
        assert_eq!(said.faults(&NOTHING).len(), 1);
        let quiet = Expected { complaints: &[], causes: &[], allowed: &[] };
        assert!(said.faults(&quiet).is_empty());
    }
}
