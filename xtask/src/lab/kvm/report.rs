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
    /// What a guest of the conformance suite found wrong.
    pub findings: Vec<Finding>,
    /// Why it may fail all the same.
    pub known: Option<&'static str>,
}

/// One test inside a guest that failed.
#[derive(Debug, PartialEq, Serialize)]
pub struct Finding {
    pub what: String,
    /// Whose fault it is, if it is none of the engine's.
    pub known: Option<&'static str>,
}

/// Cases in which the lab is wrong, and why.
const KNOWN: [(&str, &str); 1] = [(
    "kvm-timer",
    "ticks of 1 ms are too fast for a translated processor on a busy host; `cargo xtask test` has them",
)];

/// Findings that are not the engine's, by case and beginning, and why.
const KNOWN_FINDINGS: [(&str, &str, &str); 9] = [
    ("kvm-exceptions", "#DB out", IO_BREAKPOINT),
    ("kvm-exceptions", "#DB in", IO_BREAKPOINT),
    ("kvm-exceptions", "#DB rep outs", IO_BREAKPOINT),
    ("kvm-exceptions", "DR6.B2", IO_BREAKPOINT),
    ("kvm-exceptions", "one byte was written", IO_BREAKPOINT),
    ("kvm-fpu", "CPUID: size with AVX", XSETBV),
    ("kvm-fpu", "AVX", XSETBV),
    ("kvm-fpu", "unexpected vector 6", XSETBV),
    (
        "kvm-smc",
        "writes its next instruction through an alias",
        "not proved: no part of KVM or the engine sees that store, and QEMU's translator without SVM takes it; under its \
         nested paging it seems to run on with what it had translated (AMD APM vol. 2, 7.6.1: it is to see the store)",
    ),
];
const IO_BREAKPOINT: &str = "KVM emulates port instructions and looks at no I/O breakpoints there (Intel SDM vol. 3B, \
                             18.2.4: #DB); the software engine does";
const XSETBV: &str = "QEMU's translator does not intercept XSETBV (AMD APM vol. 2, 15.9: it is to), so KVM never learns \
                      of XCR0";

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
        let whose = |case: &str, what: &str| {
            let listed = KNOWN_FINDINGS.iter().find(|(of, begin, _)| *of == case && what.starts_with(begin));
            listed.map(|(_, _, why)| *why)
        };
        let mut report = Report::default();
        for line in lines {
            let Some(rest) = line.strip_prefix("LAB ") else { continue };
            let words: Vec<&str> = rest.split_whitespace().collect();
            match words.as_slice() {
                ["case", name, status, seconds] => report.cases.push(Case {
                    name: (*name).to_owned(),
                    status: (*status).to_owned(),
                    seconds: seconds.parse().unwrap_or(0.0),
                    findings: Vec::new(),
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
                ["fail", case, ..] => {
                    let what = rest.splitn(3, ' ').nth(2).unwrap_or_default().to_owned();
                    let known = whose(case, &what);
                    if let Some(last) = report.cases.last_mut() {
                        last.findings.push(Finding { what, known });
                    }
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
        let good = |case: &Case| {
            case.status == "ok"
                || case.known.is_some()
                || !case.findings.is_empty() && case.findings.iter().all(|finding| finding.known.is_some())
        };
        let failed = self.cases.iter().filter(|case| !good(case));
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
            for finding in &case.findings {
                writeln!(f, "    {}", finding.what)?;
                if let Some(known) = finding.known {
                    writeln!(f, "        {known}")?;
                }
            }
            if let Some(known) = case.known.filter(|_| case.status != "ok") {
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
LAB case kvm-hello ok 1.25
LAB case boot-1 124 150.00
LAB out last words
LAB case kvm-fpu 3 2.00
LAB fail kvm-fpu AVX: expected to hold
LAB value init-pc 3.5 s
LAB value init-pc 2.5 s
LAB value init-pc none s
LAB doctor {\"engine\": \"kvm\"}
LAB end";
        let report = Report::of(console.lines());
        assert_eq!(report.cases.len(), 3);
        assert_eq!(report.faults(), ["boot-1"]);
        assert_eq!(report.values["init-pc"], ("s".to_owned(), vec![3.5, 2.5]));
        assert_eq!(report.doctor.as_ref().unwrap()["engine"], "kvm");
        let text = report.to_string();
        assert!(text.contains("last words") && text.contains("median 3.50 s"), "{text}");
        let more = console.replace("LAB value init-pc 3.5 s", "LAB fail kvm-fpu fsin: expected 0x1 got 0x2");
        assert_eq!(Report::of(more.lines()).faults(), ["boot-1", "kvm-fpu"]);
        let cut = Report::of(console.lines().take(2));
        assert_eq!(cut.faults(), ["the end of the lab"]);
    }
}
