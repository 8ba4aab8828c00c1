//! The table, beside that of 2007; files of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::cell::{Device, Guest, Load, Policy, word};
use super::run::Outcome;

/// The measurements of November 2007 by Dave Winchell on the xen-devel list, in ppm of the two guests, both
/// compensating: protocol, load, hours, SLES, Red Hat.
pub const OF_2007: [(Policy, &str, f64, f64, f64); 18] = [
    (Policy::Async, "cpu", 23.67, -58.0, 52.0),
    (Policy::Async, "cpu", 3.32, -11.0, 121.0),
    (Policy::Sync, "cpu", 2.35, -95.0, -40.0),
    (Policy::Sync, "cpu", 1.42, -47.0, -51.0),
    (Policy::Sync, "cpu", 65.67, -76.0, -34.0),
    (Policy::LateOne, "cpu", 0.47, -446.0, -399.0),
    (Policy::LateOne, "cpu", 15.65, -337.0, -309.0),
    (Policy::Async, "i/o", 17.28, -98.0, -895.0),
    (Policy::Async, "i/o", 2.73, -149.0, -1423.0),
    (Policy::Sync, "i/o", 15.63, -172.0, -219.0),
    (Policy::Sync, "i/o", 0.8, -160.0, -167.0),
    (Policy::LateOne, "i/o", 4.03, -200.0, -286.0),
    (Policy::LateOne, "i/o", 16.03, -232.0, -314.0),
    (Policy::LateOne, "i/o", 0.47, -1196.0, -399.0),
    (Policy::Sync, "i/o", 2.42, -110.0, -49.0),
    (Policy::Async, "i/o", 0.67, -1013.0, -1154.0),
    (Policy::LateOne, "i/o", 113.77, -725.0, 32.0),
    (Policy::Sync, "i/o", 4.83, -184.0, 83.0),
];

/// A rate with as many digits as it deserves.
pub fn ppm(value: f64) -> String {
    let digits = if value.abs() < 10.0 { 2 } else { usize::from(value.abs() < 100.0) };
    format!("{value:+.digits$}")
}

fn maybe(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), ppm)
}

const HEADS: [&str; 14] = [
    "load",
    "guest",
    "device",
    "policy",
    "does",
    "s",
    "error s",
    "%",
    "ppm",
    "1 min",
    "10 min",
    "behind ms",
    "ticks/s",
    "passes/min",
];

fn cells_of(outcome: &Outcome) -> [String; 14] {
    let cell = &outcome.cell;
    let device = if cell.device == Device::Any { "-".to_owned() } else { word(&cell.device) };
    let policy = if cell.policy == Policy::Default { "-".to_owned() } else { word(&cell.policy) };
    let head = [word(&cell.load), word(&cell.guest), device, policy, word(&cell.activity)];
    let [load, guest, device, policy, activity] = head;
    let Some(f) = &outcome.figures else {
        let none = || "-".to_owned();
        let rest = [(); 9].map(|()| none());
        let [a, b, c, d, e, f, g, h, i] = rest;
        return [load, guest, device, policy, activity, a, b, c, d, e, f, g, h, i];
    };
    let passes = outcome.passes_per_cpu_minute().map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"));
    let ticks = if cell.guest.is_linux() { "-".to_owned() } else { format!("{:.1}", f.ticks_per_second) };
    [
        load,
        guest,
        device,
        policy,
        activity,
        format!("{:.0}", f.seconds),
        format!("{:+.6}", f.error),
        format!("{:+.4}", f.ppm / 1e4),
        ppm(f.ppm),
        maybe(f.minute_ppm),
        maybe(f.ten_minutes_ppm),
        format!("{:.2}", f.deepest * 1e3),
        ticks,
        passes,
    ]
}

/// All cells, one line each, as Markdown.
pub fn table(outcomes: &[Outcome]) -> String {
    let rows: Vec<[String; 14]> = outcomes.iter().map(cells_of).collect();
    let mut widths = HEADS.map(|head| head.len().max(3));
    for row in &rows {
        for (width, text) in widths.iter_mut().zip(row) {
            *width = (*width).max(text.len());
        }
    }
    let line = |texts: &[String; 14]| {
        let mut line = String::from("|");
        for (index, (text, width)) in texts.iter().zip(widths).enumerate() {
            let _ =
                if index < 5 { write!(line, " {text:<width$} |") } else { write!(line, " {text:>width$} |") };
        }
        line.push('\n');
        line
    };
    let mut out = line(&HEADS.map(str::to_owned));
    let rule = std::array::from_fn(|index| {
        let dashes = "-".repeat(widths[index] - usize::from(index >= 5));
        if index < 5 { dashes } else { format!("{dashes}:") }
    });
    out.push_str(&line(&rule));
    for (row, outcome) in rows.iter().zip(outcomes) {
        out.push_str(&line(row));
        for what in outcome.faults.iter().chain(&outcome.complaints) {
            let _ = writeln!(out, "  ! {what}");
        }
    }
    out
}

/// The greatest of some magnitudes, with its sign.
fn worst(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(|a, b| if b.abs() > a.abs() { b } else { a })
}

fn ours<'a>(outcomes: &'a [Outcome], policy: Policy, io: Option<bool>) -> impl Iterator<Item = f64> + 'a {
    outcomes
        .iter()
        .filter(move |o| o.cell.guest == Guest::Compensate && o.cell.policy == policy)
        .filter(move |o| match io {
            Some(true) => o.cell.load == Load::Disk,
            Some(false) => matches!(o.cell.load, Load::Cpu2 | Load::Cpu3),
            None => o.cell.load != Load::None,
        })
        .filter_map(|o| o.figures.as_ref().map(|f| f.ppm))
}

/// The protocols of 2007 beside what the compensating guest showed here.
pub fn beside_2007(outcomes: &[Outcome]) -> String {
    let mut out = String::from(
        "| protocol of 2007 | policy | load | 2007, worst % | 2007, worst ppm | here, worst % | here, worst ppm | cells |\n\
         |---|---|---|---:|---:|---:|---:|---:|\n",
    );
    for (name, policy) in [("SYNC", Policy::Sync), ("MIXED", Policy::LateOne), ("ASYNC", Policy::Async)] {
        for (load, io) in [("cpu", false), ("i/o", true)] {
            let rows = OF_2007.iter().filter(|row| row.0 == policy && row.1 == load);
            let then = worst(rows.flat_map(|row| [row.3, row.4])).unwrap_or(0.0);
            let count = ours(outcomes, policy, Some(io)).count();
            let (percent, here) = match worst(ours(outcomes, policy, Some(io))) {
                Some(here) => (format!("{:+.4}", here / 1e4), ppm(here)),
                None => ("-".to_owned(), "-".to_owned()),
            };
            let _ = writeln!(
                out,
                "| {name} | {} | {load} | {:+.3} | {then:+.0} | {percent} | {here} | {count} |",
                word(&policy),
                then / 1e4
            );
        }
    }
    out
}

/// Policies by the mean magnitude of the compensating guest's error under load, the best first.
pub fn ranking(outcomes: &[Outcome]) -> Vec<(Policy, f64, f64)> {
    let mut policies: Vec<Policy> = outcomes.iter().map(|o| o.cell.policy).collect();
    policies.sort();
    policies.dedup();
    let mut ranking: Vec<(Policy, f64, f64)> = policies
        .into_iter()
        .filter_map(|policy| {
            let all: Vec<f64> = ours(outcomes, policy, None).map(f64::abs).collect();
            let top = all.iter().copied().reduce(f64::max)?;
            Some((policy, all.iter().sum::<f64>() / all.len() as f64, top))
        })
        .collect();
    ranking.sort_by(|a, b| a.1.total_cmp(&b.1));
    ranking
}

/// Passes of the fixed job per minute of CPU time, the median of the cells of each policy, the most first.
pub fn overhead(outcomes: &[Outcome]) -> Vec<(Policy, f64, usize)> {
    let mut all: BTreeMap<Policy, Vec<f64>> = BTreeMap::new();
    for outcome in outcomes {
        if let Some(rate) = outcome.passes_per_cpu_minute() {
            all.entry(outcome.cell.policy).or_default().push(rate);
        }
    }
    let mut rates: Vec<(Policy, f64, usize)> = all
        .into_iter()
        .map(|(policy, mut rates)| {
            rates.sort_by(f64::total_cmp);
            (policy, rates[rates.len() / 2], rates.len())
        })
        .collect();
    rates.sort_by(|a, b| b.1.total_cmp(&a.1));
    rates
}

/// Everything that is printed.
pub fn whole(outcomes: &[Outcome]) -> String {
    let mut out = table(outcomes);
    if outcomes.iter().any(|o| o.cell.guest == Guest::Compensate) {
        let _ = write!(out, "\nThe compensating guest beside 2007:\n\n{}", beside_2007(outcomes));
        let _ = writeln!(out, "\nThe compensating guest under load, mean and worst |ppm|, the best first:");
        for (policy, mean, top) in ranking(outcomes) {
            let _ = writeln!(out, "  {:<12} {mean:>10.1} {top:>10.1}", word(&policy));
        }
    }
    let rates = overhead(outcomes);
    if let Some((_, most, _)) = rates.first() {
        let _ = writeln!(out, "\nPasses of the fixed job per minute of CPU time (medians), beside the most:");
        for (policy, rate, cells) in &rates {
            let than = (rate / most - 1.0) * 100.0;
            let _ = writeln!(out, "  {:<12} {rate:>10.0} {than:>+7.2} %  ({cells} cells)", word(policy));
        }
    }
    out
}

/// One line for each ring that counts, one column for each thing known.
pub fn csv(outcomes: &[Outcome]) -> String {
    let mut out = String::from(
        "load,guest,device,policy,activity,hz,seed,seconds,error_s,ppm,machine_ppm,minute_ppm,ten_minutes_ppm,\
         drained_s,deepest_s,ticks_per_s,lost,passes_per_min,passes_per_cpu_min,stolen_s,cpu_s,load_before,load_after\n",
    );
    let some = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    for o in outcomes {
        let (c, Some(f)) = (&o.cell, &o.figures) else { continue };
        let names =
            [word(&c.load), word(&c.guest), word(&c.device), word(&c.policy), word(&c.activity)].join(",");
        let _ = writeln!(
            out,
            "{names},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}",
            c.hz,
            c.seed,
            f.seconds,
            f.error,
            f.ppm,
            f.machine_ppm,
            some(f.minute_ppm),
            some(f.ten_minutes_ppm),
            f.drained,
            f.deepest,
            f.ticks_per_second,
            f.lost,
            f.passes_per_minute,
            some(o.passes_per_cpu_minute()),
            o.stolen,
            o.cpu_seconds,
            o.load[0],
            o.load[1]
        );
    }
    out
}

/// Writes table, CSV, JSON and chart into `out`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(outcomes: &[Outcome], out: &Path) -> Result<()> {
    let put = |name: &str, text: String| {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
    };
    put("skew.md", whole(outcomes))?;
    put("skew.csv", csv(outcomes))?;
    put("skew.json", serde_json::to_string_pretty(outcomes)?)?;
    put("skew.svg", super::chart::svg(outcomes))
}

#[cfg(test)]
pub mod tests {
    use super::super::cell::{Activity, Cell};
    use super::super::measure::{Course, Figures};
    use super::*;

    pub fn outcome(policy: Policy, guest: Guest, load: Load, ppm: f64) -> Outcome {
        let course = (0..=60).map(|at| (f64::from(at), f64::from(at) * ppm / 1e6)).collect();
        Outcome {
            cell: Cell {
                seed: 1,
                load,
                guest,
                device: Device::Pit,
                policy,
                activity: Activity::Spin,
                hz: 1000,
                seconds: 61,
            },
            figures: Some(Figures {
                seconds: 60.0,
                error: ppm * 60.0 / 1e6,
                ppm,
                drained: ppm * 60.0 / 1e6,
                machine_ppm: 0.0,
                minute_ppm: Some(ppm),
                ten_minutes_ppm: None,
                deepest: 0.0,
                ticks_per_second: 999.5,
                lost: 0,
                passes_per_minute: 100.0,
                rings: 61,
                course: Course(course),
            }),
            faults: Vec::new(),
            complaints: Vec::new(),
            stolen: 0.0,
            cpu_seconds: 30.0,
            load: [0.5, 0.7],
        }
    }

    #[test]
    fn tables_and_rankings() {
        let all = [
            outcome(Policy::Sync, Guest::Compensate, Load::Cpu3, -12.3),
            outcome(Policy::LateOne, Guest::Compensate, Load::Cpu3, 456.0),
            outcome(Policy::LateOne, Guest::Compensate, Load::Cpu2, -400.0),
            outcome(Policy::Replay, Guest::Count, Load::Cpu3, 0.5),
        ];
        let table = table(&all);
        assert_eq!(table.lines().count(), 2 + 4);
        let lens: Vec<usize> = table.lines().map(str::len).collect();
        assert!(lens.iter().all(|len| *len == lens[0]), "{table}");
        assert!(table.contains("| -12.3 |") && table.contains(" +456 |"), "{table}");
        let ranking = ranking(&all);
        assert_eq!((ranking[0].0, ranking[1]), (Policy::Sync, (Policy::LateOne, 428.0, 456.0)));
        let beside = beside_2007(&all);
        assert!(beside.contains("| SYNC | sync | cpu | -0.009 | -95 | -0.0012 | -12.3 | 1 |"), "{beside}");
        assert!(beside.contains("| ASYNC | async | i/o | -0.142 | -1423 | - | - | 0 |"), "{beside}");
        // 100 passes in a minute that took 30 s of CPU time.
        assert_eq!(overhead(&all)[0].1, 200.0);
        assert_eq!(csv(&all).lines().count(), 5);
        let columns: Vec<usize> = csv(&all).lines().map(|line| line.split(',').count()).collect();
        assert!(columns.iter().all(|count| *count == columns[0]));
    }

    #[test]
    fn rates_as_precise_as_they_are() {
        assert_eq!([0.1234, -45.67, 1234.5].map(ppm), ["+0.12", "-45.7", "+1234"].map(str::to_owned));
    }
}
