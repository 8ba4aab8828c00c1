//! What the lab's console says, as a report.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// One case.
#[derive(Debug, PartialEq, Serialize)]
pub struct Case {
    pub name: String,
    /// `ok`, or what it was instead.
    pub status: String,
    pub seconds: f64,
    /// Why it may fail.
    pub known: Option<&'static str>,
}

/// Where an engine differs from the others, by case, and who is right.
const KNOWN: [(&str, &str); 0] = [];

/// All of it.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub cases: Vec<Case>,
    /// Measurements by name: unit and values.
    pub values: BTreeMap<String, (String, Vec<f64>)>,
    /// What `wardian doctor --json` said.
    pub doctor: Option<serde_json::Value>,
    /// Lines worth reading.
    pub said: Vec<String>,
    /// It came to its end.
    pub ended: bool,
}

impl Report {
    pub fn of<'a>(lines: impl Iterator<Item = &'a str>) -> Report {
        let mut report = Report::default();
        for line in lines {
            let Some(rest) = line.strip_prefix("LAB ") else { continue };
            let words: Vec<&str> = rest.split_whitespace().collect();
            match words.as_slice() {
                ["case", name, status, seconds] => report.cases.push(Case {
                    name: (*name).to_owned(),
                    status: (*status).to_owned(),
                    seconds: seconds.parse().unwrap_or(0.0),
                    known: KNOWN.iter().find(|(known, _)| known == name).map(|(_, why)| *why),
                }),
                ["value", name, number, unit] => {
                    let (_, values) = report
                        .values
                        .entry((*name).to_owned())
                        .or_insert_with(|| ((*unit).to_owned(), Vec::new()));
                    values.extend(number.parse::<f64>().ok());
                }
                ["doctor", ..] => {
                    report.doctor = serde_json::from_str(rest.trim_start_matches("doctor ")).ok();
                }
                ["out", ..] => report.said.push(rest.trim_start_matches("out ").to_owned()),
                ["end"] => report.ended = true,
                _ => {}
            }
        }
        report
    }

    /// Names of the cases that failed without a known reason, and what else is wrong.
    pub fn faults(&self) -> Vec<String> {
        let failed = self.cases.iter().filter(|case| case.status != "ok" && case.known.is_none());
        let mut faults: Vec<String> = failed.map(|case| case.name.clone()).collect();
        if !self.ended {
            faults.push("the end of the lab".to_owned());
        }
        faults
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.said {
            writeln!(f, "    {line}")?;
        }
        for case in &self.cases {
            writeln!(f, "{:<28} {:<8} {:7.2} s", case.name, case.status, case.seconds)?;
            if let Some(known) = case.known {
                writeln!(f, "    {known}")?;
            }
        }
        for (name, (unit, values)) in &self.values {
            writeln!(f, "{name:<28} median {:.2} {unit} of {values:?}", median(values))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_becomes_a_report() {
        let console = "\
boot noise
LAB case kvm/hello ok 1.25
LAB case boot-1 124 150.00
LAB out last words
LAB value init-pc 3.5 s
LAB value init-pc 2.5 s
LAB value init-pc none s
LAB doctor {\"engine\": \"kvm\"}
LAB end";
        let report = Report::of(console.lines());
        assert_eq!(report.cases.len(), 2);
        assert_eq!(report.faults(), ["boot-1"]);
        assert_eq!(report.values["init-pc"], ("s".to_owned(), vec![3.5, 2.5]));
        assert_eq!(report.doctor.as_ref().unwrap()["engine"], "kvm");
        let text = report.to_string();
        assert!(text.contains("last words") && text.contains("median 3.50 s"), "{text}");
        let cut = Report::of(console.lines().take(2));
        assert_eq!(cut.faults(), ["the end of the lab"]);
    }
}
