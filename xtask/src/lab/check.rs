//! The promises of SPECIFICATION.md about skew, asked of the cells that were measured.

use super::cell::{Activity, Guest, Load, Policy, word};
use super::measure::UNDISTURBED_NS;
use super::report::{overhead, ppm, ranking};
use super::run::Outcome;

/// Most that a stock Linux guest may be off, over a run of at least [`LINUX_SECONDS`], and in 10 minutes.
const LINUX_PPM: f64 = 1.0;
const LINUX_WINDOW_PPM: f64 = 5.0;
const LINUX_SECONDS: f64 = 1190.0;
/// Most that a counting guest may be off under a policy that conserves ticks, if that is more than a tick.
const CONSERVING_PPM: f64 = 5.0;
/// Most that a compensating guest may be off under `sync`, at all and in 10 minutes.
const SYNC_PPM: f64 = 220.0;
const SYNC_WINDOW_PPM: f64 = 500.0;
/// Part of the passes of the fixed job that the best policy may cost beside the cheapest.
const OVERHEAD: f64 = 0.03;

/// What became of a promise.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Kept(String),
    Broken(Vec<String>),
    Skipped(&'static str),
}

/// All promises with what became of each.
pub fn all(outcomes: &[Outcome]) -> Vec<(&'static str, Verdict)> {
    vec![
        ("every cell was measured", measured(outcomes)),
        ("a stock Linux guest under 3:1 overcommit: 1 ppm in 20 minutes, 5 ppm in any 10", linux(outcomes)),
        ("a counting guest under a conserving policy: one tick or 5 ppm once drained", conserving(outcomes)),
        ("a compensating guest under sync: 220 ppm", sync(outcomes, |f| Some((f.ppm, SYNC_PPM)))),
        (
            "a compensating guest under sync: 500 ppm in any 10 minutes",
            sync(outcomes, |f| f.ten_minutes_ppm.map(|ppm| (ppm, SYNC_WINDOW_PPM))),
        ),
        ("the ranking of 2007: sync before late-one and async", of_2007(outcomes)),
        ("the overhead of sync is within 3 % of the cheapest", cheap(outcomes)),
    ]
}

/// Judges `checks`: (what, value, limit).
fn judge(checks: &[(String, f64, f64)], unit: &str, skipped: &'static str) -> Verdict {
    let worst = checks.iter().map(|check| check.1.abs() / check.2).fold(0.0, f64::max);
    let broken: Vec<String> = checks
        .iter()
        .filter(|check| check.1.abs() > check.2)
        .map(|(what, value, limit)| format!("{what}: {} {unit}, allowed {}", ppm(*value), ppm(*limit)))
        .collect();
    if checks.is_empty() {
        Verdict::Skipped(skipped)
    } else if broken.is_empty() {
        Verdict::Kept(format!("{} cells, the worst at {:.0} % of the limit", checks.len(), worst * 100.0))
    } else {
        Verdict::Broken(broken)
    }
}

fn measured(outcomes: &[Outcome]) -> Verdict {
    let broken: Vec<String> = outcomes
        .iter()
        .filter(|o| !o.faults.is_empty())
        .map(|o| format!("{}: {}", o.cell, o.faults.join("; ")))
        .collect();
    match broken {
        none if none.is_empty() => Verdict::Kept(format!("{} cells", outcomes.len())),
        broken => Verdict::Broken(broken),
    }
}

fn linux(outcomes: &[Outcome]) -> Verdict {
    let mut checks = Vec::new();
    for o in outcomes.iter().filter(|o| o.cell.guest == Guest::Linux && o.cell.load == Load::Cpu3) {
        let Some(f) = o.figures.as_ref().filter(|f| f.seconds >= LINUX_SECONDS) else { continue };
        checks.push((o.cell.to_string(), f.ppm, LINUX_PPM));
        checks
            .extend(f.ten_minutes_ppm.map(|ppm| (format!("{}, 10 minutes", o.cell), ppm, LINUX_WINDOW_PPM)));
    }
    judge(&checks, "ppm", "no such cell ran for 20 minutes")
}

fn conserving(outcomes: &[Outcome]) -> Verdict {
    let cells = outcomes.iter().filter(|o| o.cell.guest == Guest::Count && o.cell.policy.conserves());
    let checks: Vec<(String, f64, f64)> = cells
        .filter_map(|o| {
            let f = o.figures.as_ref()?;
            // The first and the last ring may each have taken so long.
            let unsure = 2.0 * UNDISTURBED_NS as f64 / 1e3;
            let allowed = (1e6 / o.cell.hz as f64).max(CONSERVING_PPM * f.seconds) + unsure;
            Some((o.cell.to_string(), f.drained * 1e6, allowed))
        })
        .collect();
    judge(&checks, "us", "there is no such cell")
}

fn sync(outcomes: &[Outcome], limit: impl Fn(&super::measure::Figures) -> Option<(f64, f64)>) -> Verdict {
    let cells =
        outcomes.iter().filter(|o| o.cell.guest == Guest::Compensate && o.cell.policy == Policy::Sync);
    let checks: Vec<(String, f64, f64)> = cells
        .filter_map(|o| limit(o.figures.as_ref()?).map(|(value, limit)| (o.cell.to_string(), value, limit)))
        .collect();
    judge(&checks, "ppm", "no such cell ran for long enough")
}

fn of_2007(outcomes: &[Outcome]) -> Verdict {
    let ranking = ranking(outcomes);
    let mean = |policy| ranking.iter().find(|rank| rank.0 == policy).map(|rank| rank.1);
    let (Some(sync), Some(mixed), Some(asynchronous)) =
        (mean(Policy::Sync), mean(Policy::LateOne), mean(Policy::Async))
    else {
        return Verdict::Skipped("sync, late-one and async were not all measured under load");
    };
    let told = format!("mean |ppm| sync {sync:.1}, late-one {mixed:.1}, async {asynchronous:.1}");
    if sync <= mixed && sync <= asynchronous { Verdict::Kept(told) } else { Verdict::Broken(vec![told]) }
}

fn cheap(outcomes: &[Outcome]) -> Verdict {
    let jobs: Vec<Outcome> = outcomes.iter().filter(|o| o.cell.activity == Activity::Job).cloned().collect();
    let rates = overhead(&jobs);
    let sync = rates.iter().find(|rate| rate.0 == Policy::Sync);
    let (Some((cheapest, most, _)), Some((_, sync, cells))) = (rates.first(), sync) else {
        return Verdict::Skipped("the fixed job was not measured (--activities job)");
    };
    if rates.len() < 2 || *cells < 3 {
        return Verdict::Skipped("the fixed job needs two policies and three seeds at least");
    }
    let cost = 1.0 - sync / most;
    let told = format!("{:.2} % beside {}", cost * 100.0, word(cheapest));
    if cost <= OVERHEAD { Verdict::Kept(told) } else { Verdict::Broken(vec![told]) }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::outcome;
    use super::*;

    fn verdict(outcomes: &[Outcome], begins: &str) -> Verdict {
        all(outcomes).into_iter().find(|(what, _)| what.starts_with(begins)).unwrap().1
    }

    #[test]
    fn promises_kept_broken_and_skipped() {
        let good = [outcome(Policy::Sync, Guest::Compensate, Load::Cpu3, -219.0)];
        assert!(matches!(verdict(&good, "a compensating guest under sync: 220"), Verdict::Kept(_)));
        assert!(matches!(verdict(&good, "a compensating guest under sync: 500"), Verdict::Skipped(_)));
        let bad = [outcome(Policy::Sync, Guest::Compensate, Load::Stop, 221.0)];
        assert!(matches!(verdict(&bad, "a compensating guest under sync: 220"), Verdict::Broken(_)));
        // 18.6 ppm of a minute is a tick of 1 ms and the length of two rings.
        let tick = |ppm| [outcome(Policy::Replay, Guest::Count, Load::Stop, ppm)];
        assert!(matches!(verdict(&tick(-18.6), "a counting"), Verdict::Kept(_)));
        assert!(matches!(verdict(&tick(18.8), "a counting"), Verdict::Broken(_)));
        let mut linux = outcome(Policy::Default, Guest::Linux, Load::Cpu3, 0.9);
        assert!(matches!(verdict(&[linux.clone()], "a stock"), Verdict::Skipped(_)));
        linux.figures.as_mut().unwrap().seconds = 1200.0;
        assert!(matches!(verdict(&[linux.clone()], "a stock"), Verdict::Kept(_)));
        linux.figures.as_mut().unwrap().ten_minutes_ppm = Some(-5.1);
        assert!(matches!(verdict(&[linux.clone()], "a stock"), Verdict::Broken(_)));
        linux.faults.push("the machine ended with status 8".to_owned());
        assert!(matches!(verdict(&[linux], "every cell"), Verdict::Broken(_)));
    }

    #[test]
    fn the_ranking_and_the_overhead() {
        let of = |policy, ppm| outcome(policy, Guest::Compensate, Load::Cpu2, ppm);
        let mut all = vec![of(Policy::Sync, 10.0), of(Policy::LateOne, -20.0)];
        assert!(matches!(verdict(&all, "the ranking"), Verdict::Skipped(_)));
        all.push(of(Policy::Async, 9.0));
        assert!(matches!(verdict(&all, "the ranking"), Verdict::Broken(_)));
        all[2] = of(Policy::Async, 30.0);
        assert!(matches!(verdict(&all, "the ranking"), Verdict::Kept(_)));
        assert!(matches!(verdict(&all, "the overhead"), Verdict::Skipped(_)));
        let mut jobs = Vec::new();
        for (policy, cpu) in [(Policy::Sync, 30.8), (Policy::LateOne, 30.0)] {
            for _ in 0..3 {
                let mut job = of(policy, 1.0);
                (job.cell.activity, job.cpu_seconds) = (Activity::Job, cpu);
                jobs.push(job);
            }
        }
        assert!(matches!(verdict(&jobs, "the overhead"), Verdict::Kept(_)));
        jobs.iter_mut()
            .for_each(|job| job.cpu_seconds += f64::from(u8::from(job.cell.policy == Policy::Sync)));
        assert!(matches!(verdict(&jobs, "the overhead"), Verdict::Broken(_)));
    }
}
