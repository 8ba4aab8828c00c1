//! [`Checkup`]: what this host offers to machines, for people and for programs.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use wardian_engine_kvm::KvmHost;

use crate::engine;

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Good,
    /// Worth knowing.
    Note,
    /// Something is not to be had here.
    Lacking,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How good that is.
    pub grade: Grade,
    /// What was found.
    pub found: String,
}

/// The KVM of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvmFound {
    /// The device can be used.
    pub usable: bool,
    /// There is virtualization hardware behind it.
    pub hardware: bool,
    /// Instructions a second of the probe guest.
    pub instructions_per_second: Option<u64>,
    /// What it is not good for, and why.
    pub why_not: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checkup {
    /// The engine that `--engine auto` takes.
    pub engine: &'static str,
    /// Why.
    pub why: String,
    /// `/dev/kvm`.
    pub kvm: KvmFound,
    /// Everything, one by one.
    pub findings: Vec<Finding>,
}

/// A small file of the host's kernel.
fn told(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn look_at_kvm() -> KvmFound {
    let host = match KvmHost::open() {
        Ok(host) => host,
        Err(error) => return KvmFound { why_not: Some(error.to_string()), ..KvmFound::default() },
    };
    match host.probe() {
        Err(error) => KvmFound { why_not: Some(error.to_string()), ..KvmFound::default() },
        Ok(probe) => {
            let software = probe.software();
            let speed = probe.instructions_per_second;
            KvmFound {
                usable: true,
                hardware: software.is_none(),
                instructions_per_second: (speed > 0).then_some(speed),
                why_not: software.map(|why| engine::software(&why)),
            }
        }
    }
}

/// The word in brackets, as in `always [madvise] never`.
fn chosen(text: &str) -> &str {
    text.split(['[', ']']).nth(1).unwrap_or(text)
}

/// A row of `/proc/self/limits`: the soft limit.
fn limit(limits: &str, name: &str) -> Option<String> {
    let row = limits.lines().find(|row| row.starts_with(name))?;
    row[name.len()..].split_whitespace().next().map(str::to_owned)
}

fn time(add: &mut impl FnMut(&'static str, Grade, String)) {
    let source = told("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let stable = source.as_deref() == Some("tsc") || source.as_deref() == Some("kvm-clock");
    let hz = wardian_time::host_hz() as f64 / 1e6;
    let source = source.unwrap_or_else(|| "unknown".into());
    if stable {
        add("tsc", Grade::Good, format!("stable, {hz:.2} MHz (clocksource {source})"));
    } else {
        let found = format!(
            "{hz:.2} MHz, not trusted by the host's kernel (clocksource {source}): guest clocks may drift"
        );
        add("tsc", Grade::Lacking, found);
    }
    // Eighth field of the first row: ticks of 10 ms that a hypervisor took from this host.
    let stolen = told("/proc/stat")
        .and_then(|text| text.lines().next()?.split_whitespace().nth(8)?.parse::<u64>().ok());
    match stolen {
        Some(0) => add("steal time", Grade::Good, "nothing is taken from this host".into()),
        Some(ticks) => {
            add("steal time", Grade::Note, format!("{:.1} s since it was booted", ticks as f64 / 100.0));
        }
        None => add("steal time", Grade::Note, "not told".into()),
    }
    let accounted = Path::new("/proc/thread-self/schedstat").exists();
    let grade = if accounted { Grade::Good } else { Grade::Lacking };
    let found =
        if accounted { "the host's scheduler tells it" } else { "the host's kernel does not account it" };
    add("guest steal time", grade, found.into());
}

fn resources(add: &mut impl FnMut(&'static str, Grade, String)) {
    let huge = told("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_else(|| "unknown".into());
    let pool = told("/proc/sys/vm/nr_hugepages").unwrap_or_else(|| "0".into());
    add(
        "huge pages",
        Grade::Note,
        format!("transparent for shared memory: {}; reserved: {pool}", chosen(&huge)),
    );
    let limits = told("/proc/self/limits").unwrap_or_default();
    for (what, row) in [
        ("open files", "Max open files"),
        ("locked memory", "Max locked memory"),
        ("address space", "Max address space"),
    ] {
        if let Some(found) = limit(&limits, row) {
            add(what, Grade::Note, format!("at most {found}"));
        }
    }
    let paranoid = told("/proc/sys/kernel/perf_event_paranoid").and_then(|text| text.parse::<i32>().ok());
    let hardware = Path::new("/sys/bus/event_source/devices/cpu").exists();
    match (hardware, paranoid) {
        (false, _) => add("performance counters", Grade::Lacking, "the host has none".into()),
        (true, Some(level)) => {
            add("performance counters", Grade::Note, format!("perf_event_paranoid {level}"));
        }
        (true, None) => {
            add("performance counters", Grade::Lacking, "the host's kernel has no perf events".into());
        }
    }
    let group = told("/proc/self/cgroup")
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned)));
    let found = match group {
        None => (Grade::Note, "no version 2 hierarchy".into()),
        Some(group) => {
            let dir = Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/'));
            let writable = std::fs::metadata(&dir).is_ok_and(|meta| !meta.permissions().readonly());
            let limit = |name| told(dir.join(name)).unwrap_or_else(|| "no limit".into());
            let (cpu, memory) = (limit("cpu.max"), limit("memory.max"));
            let rights = if writable { "may be divided" } else { "not writable" };
            (Grade::Note, format!("{group} ({rights}); cpu {cpu}, memory {memory}"))
        }
    };
    add("cgroup", found.0, found.1);
}

impl Checkup {
    /// Looks at everything; takes a tenth of a second.
    #[must_use]
    pub fn examine() -> Checkup {
        let kvm = look_at_kvm();
        let mut findings = Vec::new();
        let mut add = |what, grade, found| findings.push(Finding { what, grade, found });
        let speed = kvm.instructions_per_second.map(|speed| {
            format!(" ({:.0} million instructions a second in the probe guest)", speed as f64 / 1e6)
        });
        match &kvm.why_not {
            None => add("kvm", Grade::Good, format!("virtualization hardware{}", speed.unwrap_or_default())),
            Some(why) => add("kvm", Grade::Lacking, why.clone()),
        }
        let carries =
            std::arch::is_x86_feature_detected!("bmi2") && std::arch::is_x86_feature_detected!("avx2");
        if carries {
            add("software engine", Grade::Good, "the processor has what it needs (AVX2, BMI2)".into());
        } else {
            add("software engine", Grade::Lacking, "the processor lacks AVX2 or BMI2".into());
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        add("processors", Grade::Note, format!("{cpus}"));
        time(&mut add);
        resources(&mut add);
        let (engine, why) = match &kvm.why_not {
            None => ("kvm", "this host has virtualization hardware".to_owned()),
            Some(why) => ("soft", why.clone()),
        };
        Checkup { engine, why, kvm, findings }
    }
}

impl fmt::Display for Checkup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match finding.grade {
                Grade::Good => "+",
                Grade::Note => " ",
                Grade::Lacking => "-",
            };
            writeln!(f, "{mark} {:<20} {}", finding.what, finding.found)?;
        }
        writeln!(f, "\n--engine auto takes {}: {}", self.engine, self.why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel() {
        assert_eq!(chosen("always within_size [advise] never"), "advise");
        assert_eq!(chosen("unknown"), "unknown");
        let limits = "Limit   Soft Limit  Hard Limit\nMax open files            1024                 524288               files\n";
        assert_eq!(limit(limits, "Max open files").as_deref(), Some("1024"));
        assert_eq!(limit(limits, "Max locked memory"), None);
    }

    #[test]
    fn the_verdict_and_its_reason_agree() {
        let checkup = Checkup::examine();
        assert_eq!(checkup.engine == "kvm", checkup.kvm.hardware);
        assert_eq!(checkup.kvm.hardware, checkup.kvm.why_not.is_none());
        let text = checkup.to_string();
        assert!(text.contains(&format!("--engine auto takes {}", checkup.engine)), "{text}");
        assert!(serde_json::to_string(&checkup).unwrap().contains("\"findings\""));
    }
}
