//! Running a batch of cells: guests, loads, results.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::cell::{Cell, Load};
use super::guest::Guests;
use super::load::{self, Owned};
use super::measure::{self, Figures};
use crate::bench::footprint;
use crate::throttle::Throttle;

/// How often running guests are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What came of a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    pub cell: Cell,
    /// None: no two good readings.
    pub figures: Option<Figures>,
    /// What went wrong.
    pub faults: Vec<String>,
    /// What the guest's kernel said of stuck processors and clocks.
    pub complaints: Vec<String>,
    /// Seconds for which our own train stopped it.
    pub stolen: f64,
    /// CPU time of the whole process.
    pub cpu_seconds: f64,
    /// Load average of the host before and after.
    pub load: [f64; 2],
}

impl Outcome {
    /// Passes of the job in a minute of CPU time: what a busy host does not change.
    pub fn passes_per_cpu_minute(&self) -> Option<f64> {
        let figures = self.figures.as_ref()?;
        let passes = figures.passes_per_minute * figures.seconds / 60.0;
        (passes > 0.0 && self.cpu_seconds > 0.0).then(|| passes * 60.0 / self.cpu_seconds)
    }
}

/// Where the files of the lab go.
pub struct Place(PathBuf);

impl Place {
    /// # Errors
    /// When the folders cannot be made.
    pub fn new(out: &Path) -> Result<Place> {
        for dir in ["cells", "logs", "guests"] {
            let dir = out.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("Cannot create {}", dir.display()))?;
        }
        Ok(Place(out.to_owned()))
    }

    pub fn guests(&self) -> PathBuf {
        self.0.join("guests")
    }

    fn cell(&self, cell: &Cell) -> PathBuf {
        self.0.join("cells").join(format!("{cell}.json"))
    }

    fn rings(&self, cell: &Cell) -> PathBuf {
        self.0.join("cells").join(format!("{cell}.rings.csv"))
    }

    fn log(&self, cell: &Cell) -> PathBuf {
        self.0.join("logs").join(format!("{cell}.log"))
    }

    /// What a run before found in this cell.
    pub fn had(&self, cell: &Cell) -> Option<Outcome> {
        let outcome: Outcome = serde_json::from_str(&fs::read_to_string(self.cell(cell)).ok()?).ok()?;
        (outcome.cell == *cell && outcome.faults.is_empty()).then_some(outcome)
    }

    /// What runs before found in all cells, in their order.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn all(&self) -> Result<Vec<Outcome>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.0.join("cells"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|suffix| suffix == "json") {
                let text = fs::read_to_string(&path)?;
                let outcome: Outcome = serde_json::from_str(&text)
                    .with_context(|| format!("Not the result of a cell: {}", path.display()))?;
                all.push(outcome);
            }
        }
        all.sort_by_key(|outcome| outcome.cell);
        Ok(all)
    }

    fn keep(&self, outcome: &Outcome) -> Result<()> {
        let path = self.cell(&outcome.cell);
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_string_pretty(outcome)?)?;
        fs::rename(&part, &path).with_context(|| format!("Cannot write {}", path.display()))
    }
}

/// One guest that runs.
struct Running {
    child: Owned,
    cell: Cell,
    cpu: Duration,
    /// Its end: how it ended, or that it had to be killed.
    end: Option<Result<i32, String>>,
}

/// Runs `batch` at once, with its load; keeps and returns what came of it.
///
/// # Errors
/// When a guest or a load cannot be started.
pub fn batch(guests: &Guests, place: &Place, batch: &[Cell], cores: usize) -> Result<Vec<Outcome>> {
    let Some(first) = batch.first() else { return Ok(Vec::new()) };
    let before = loadavg();
    let throttle = match first.load {
        Load::Cgroup10 => Some(Throttle::share(Duration::from_millis(10), 0.5)?),
        Load::Cgroup100 => Some(Throttle::share(Duration::from_millis(100), 0.5)?),
        _ => None,
    };
    let core = |index: usize| match first.load {
        Load::Cpu2 | Load::Cpu3 => Some(index % cores),
        Load::Disk => Some(0),
        _ => None,
    };
    // Company for what is not there to fill the cores.
    let full = first.load.share().map_or(batch.len(), |share| share * cores);
    let mut company: Vec<Owned> =
        (batch.len()..full).map(|i| load::spinner(i % cores)).collect::<Result<_>>()?;
    if first.load == Load::Disk && !first.guest.is_linux() {
        let mut reader = guests.reader(core(0))?;
        reader.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        company.push(Owned(reader.spawn().context("Cannot start the guest that reads its disk")?));
        // Past its boot.
        thread::sleep(Duration::from_secs(3));
    }
    let began = Instant::now();
    let mut running = Vec::new();
    for (index, cell) in batch.iter().enumerate() {
        let log = File::create(place.log(cell))?;
        let mut command = guests.command(cell, &place.rings(cell), core(index))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = Owned(command.spawn().context("Cannot start the machine")?);
        if let Some(throttle) = &throttle {
            throttle.add(child.0.id())?;
        }
        running.push(Running { child, cell: *cell, cpu: Duration::ZERO, end: None });
    }
    let over = AtomicBool::new(false);
    let stops = load::stops(first);
    let pid = running[0].child.0.id();
    let (lifted, stolen) = thread::scope(|scope| {
        let thief = scope.spawn(|| {
            load::steal(pid, load::signals(first.load), began, &stops, &|| over.load(Ordering::Relaxed))
        });
        let lifted = wait(&mut running, began, throttle.as_ref());
        over.store(true, Ordering::Relaxed);
        (lifted, thief.join().unwrap_or(0.0))
    });
    lifted?;
    drop(company);
    let load = [before, loadavg()];
    let mut outcomes = Vec::new();
    for guest in &running {
        let outcome = outcome(place, guest, stolen, load)?;
        place.keep(&outcome)?;
        outcomes.push(outcome);
    }
    drop(running);
    Ok(outcomes)
}

/// Waits until all have ended; kills those that take far too long.
fn wait(running: &mut [Running], began: Instant, throttle: Option<&Throttle>) -> Result<()> {
    let mut throttled = throttle;
    while running.iter().any(|guest| guest.end.is_none()) {
        thread::sleep(LOOK);
        let at = began.elapsed().as_secs_f64();
        if let Some(throttle) = throttled.filter(|_| at >= running[0].cell.loaded() as f64) {
            throttle.lift()?;
            throttled = None;
        }
        for guest in running.iter_mut().filter(|guest| guest.end.is_none()) {
            if let Some(cpu) = footprint::cpu_time(guest.child.0.id()) {
                guest.cpu = cpu;
            }
            if let Some(status) = guest.child.0.try_wait()? {
                guest.end = Some(status.code().ok_or_else(|| status.to_string()));
            } else if at > (guest.cell.seconds * 4 + 120) as f64 {
                guest.child.0.kill()?;
                guest.child.0.wait()?;
                guest.end = Some(Err("it was far from its end and killed".to_owned()));
            }
        }
    }
    Ok(())
}

fn outcome(place: &Place, guest: &Running, stolen: f64, load: [f64; 2]) -> Result<Outcome> {
    let cell = guest.cell;
    let text = fs::read_to_string(place.rings(&cell)).unwrap_or_default();
    let log = fs::read(place.log(&cell)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let figures = measure::figures(&measure::parse(&text), cell.guest.is_linux());
    let mut faults = Vec::new();
    let wanted = i32::from(!cell.guest.is_linux());
    match &guest.end {
        Some(Ok(code)) if *code == wanted => {}
        Some(Ok(code)) => faults.push(format!("the machine ended with status {code}")),
        Some(Err(why)) => faults.push(format!("the machine: {why}")),
        None => faults.push("the machine did not end".to_owned()),
    }
    if !faults.is_empty() {
        faults.extend(log.lines().last().map(str::to_owned));
    }
    if figures.is_none() {
        faults.push("the doorbell was not rung twice without disturbance".to_owned());
    }
    let complaints = log.lines().filter(|line| complains(line)).map(str::to_owned).collect();
    Ok(Outcome { cell, figures, faults, complaints, stolen, cpu_seconds: guest.cpu.as_secs_f64(), load })
}

/// Whether a line of the guest's kernel tells of a stuck processor or a clock that it does not trust.
fn complains(line: &str) -> bool {
    ["soft lockup", "hard LOCKUP", "detected stalls", "self-detected stall", "clocksource: Marking", "sched_clock: Marking unstable"]
        .iter()
        .any(|bad| line.contains(bad))
        // We say so ourselves.
        && !line.contains("'tsc=unstable'")
        && !line.contains("Marking TSC unstable due to boot parameter")
}

/// Load average of the last minute.
fn loadavg() -> f64 {
    let told = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    told.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_a_kernel() {
        assert!(complains("[   30.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [swapper/1:0]"));
        assert!(complains("[    1.1] clocksource: Marking clocksource tsc-early as unstable"));
        assert!(!complains("[    0.0] tsc: Marking TSC unstable due to boot parameter"));
        assert!(!complains("[    0.0] clocksource: jiffies: mask: 0xffffffff"));
    }
}
