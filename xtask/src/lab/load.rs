//! What the host does to a guest meanwhile.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::cell::{Cell, Load};

/// Shortest and longest stop and run of a train, in seconds.
const STOP: (f64, f64) = (0.001, 5.0);
const RUN: (f64, f64) = (0.05, 2.0);
/// Longest single stop, in seconds.
const PAUSE: f64 = 30.0;

/// A child that does not outlive its owner.
pub struct Owned(pub Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command that runs the program in its next argument, on `core` alone, if given, and kills it when the lab itself
/// is killed: whoever is left over would spoil what is measured next.
pub fn leashed(core: Option<usize>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if let Some(core) = core {
        command.args(["taskset", "-c", &core.to_string()]);
    }
    command
}

/// A process that loops on `core`.
///
/// # Errors
/// When it cannot be started.
pub fn spinner(core: usize) -> Result<Owned> {
    let mut command = leashed(Some(core));
    command.args(["sh", "-c", "while :; do :; done"]);
    let child = command.stdin(Stdio::null()).spawn().context("Cannot start a busy process")?;
    Ok(Owned(child))
}

/// Numbers from a seed (the generator xorshift64*, by Vigna).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Evenly in 0 to 1.
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Between the two, evenly by magnitude.
    fn magnitude(&mut self, (low, high): (f64, f64)) -> f64 {
        low * (high / low).powf(self.unit())
    }
}

/// The stops of a cell: (begin, end) in seconds from its start, in order. They end with the loaded part.
pub fn stops(cell: &Cell) -> Vec<(f64, f64)> {
    let end = cell.loaded() as f64;
    // The guest's first second is left alone.
    match cell.load {
        Load::Pause => {
            let long = PAUSE.min(cell.seconds as f64 / 3.0);
            let begin = (end - long) / 2.0;
            vec![(begin, begin + long)]
        }
        Load::Stop => {
            let mut random = Random::new(cell.seed);
            let (mut stops, mut at) = (Vec::new(), 1.0);
            loop {
                at += random.magnitude(RUN);
                let until = at + random.magnitude(STOP);
                if until >= end {
                    return stops;
                }
                stops.push((at, until));
                at = until;
            }
        }
        _ => Vec::new(),
    }
}

/// The signals that stop a machine and let it go on: by the host, or by the machine's own pause.
pub fn signals(load: Load) -> (Signal, Signal) {
    if load == Load::Pause { (Signal::USR1, Signal::USR2) } else { (Signal::STOP, Signal::CONT) }
}

/// Stops and continues process `pid` by these signals, begun at `began`, as `stops` says, until `over`. Returns
/// the seconds for which it was stopped, by our own clock.
pub fn steal(
    pid: u32,
    (stop, go_on): (Signal, Signal),
    began: Instant,
    stops: &[(f64, f64)],
    over: &dyn Fn() -> bool,
) -> f64 {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return 0.0 };
    let sleep_until = |at: f64| {
        while !over() {
            let left = at - began.elapsed().as_secs_f64();
            if left <= 0.0 {
                break;
            }
            // Exact at the end, attentive before.
            std::thread::sleep(Duration::from_secs_f64(left.min(0.1)));
        }
    };
    let mut stolen = 0.0;
    for &(begin, end) in stops {
        sleep_until(begin);
        if over() || kill_process(pid, stop).is_err() {
            break;
        }
        let stopped = Instant::now();
        sleep_until(end);
        let _ = kill_process(pid, go_on);
        stolen += stopped.elapsed().as_secs_f64();
    }
    stolen
}

#[cfg(test)]
mod tests {
    use super::super::cell::{Activity, Device, Guest, Policy};
    use super::*;

    fn cell(load: Load, seconds: u64, seed: u64) -> Cell {
        Cell {
            seed,
            load,
            guest: Guest::Count,
            device: Device::Pit,
            policy: Policy::Sync,
            activity: Activity::Idle,
            hz: 1000,
            seconds,
        }
    }

    #[test]
    fn trains_are_those_of_their_seed_and_end_in_time() {
        for seconds in [10, 60, 1200] {
            let first = stops(&cell(Load::Stop, seconds, 1));
            assert_eq!(first, stops(&cell(Load::Stop, seconds, 1)));
            assert_ne!(first, stops(&cell(Load::Stop, seconds, 2)));
            let mut at = 1.0;
            for &(begin, end) in &first {
                assert!(begin - at >= 0.05 && (0.000_99..=5.0).contains(&(end - begin)), "{begin} {end}");
                at = end;
            }
            assert!(at < cell(Load::Stop, seconds, 1).loaded() as f64);
        }
        let long = stops(&cell(Load::Stop, 1200, 3));
        let stolen: f64 = long.iter().map(|(begin, end)| end - begin).sum();
        assert!((0.3..0.7).contains(&(stolen / 1200.0)), "{stolen}");
    }

    #[test]
    fn one_pause_in_the_middle() {
        assert_eq!(stops(&cell(Load::Pause, 30, 1)), [(7.0, 17.0)]);
        let long = stops(&cell(Load::Pause, 600, 1));
        assert_eq!(long.len(), 1);
        assert_eq!(long[0].1 - long[0].0, 30.0);
        assert!(stops(&cell(Load::Cpu3, 30, 1)).is_empty());
    }

    #[test]
    fn a_load_ends_with_whoever_is_killed() {
        // A shell starts it, says its number, and is killed.
        let line = {
            let told: Vec<_> = std::iter::once(leashed(Some(0)).get_program().to_owned())
                .chain(leashed(Some(0)).get_args().map(ToOwned::to_owned))
                .map(|word| word.into_string().unwrap())
                .collect();
            format!("{} sleep 30 & echo $!; wait", told.join(" "))
        };
        let mut shell = Command::new("sh");
        let mut shell = Owned(shell.args(["-c", &line]).stdout(Stdio::piped()).spawn().unwrap());
        let mut number = String::new();
        let out = shell.0.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut number).unwrap();
        let process = format!("/proc/{}/comm", number.trim());
        let began = Instant::now();
        // Until it is what it is to be.
        while std::fs::read_to_string(&process).is_ok_and(|name| name.trim() != "sleep") {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(shell);
        while std::fs::read_to_string(&process).is_ok_and(|name| name.trim() == "sleep") {
            assert!(began.elapsed() < Duration::from_secs(20), "it goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_train_stops_a_process_and_leaves_it_running() {
        let child = Command::new("sleep").arg("30").spawn().unwrap();
        let child = Owned(child);
        let state = || {
            let told = std::fs::read_to_string(format!("/proc/{}/stat", child.0.id())).unwrap();
            told.rsplit(") ").next().unwrap().chars().next().unwrap()
        };
        let began = Instant::now();
        let (stopped, seen) = std::thread::scope(|scope| {
            let pid = child.0.id();
            let train = scope.spawn(move || steal(pid, signals(Load::Stop), began, &[(0.0, 0.5)], &|| false));
            let mut seen = false;
            while !train.is_finished() {
                seen |= state() == 'T';
                std::thread::sleep(Duration::from_millis(1));
            }
            (train.join().unwrap(), seen)
        });
        assert!(seen && stopped > 0.0 && stopped <= began.elapsed().as_secs_f64(), "{stopped}");
        assert_ne!(state(), 'T');
        let over = steal(child.0.id(), signals(Load::Stop), Instant::now(), &[(0.0, 9.0)], &|| true);
        assert_eq!(over, 0.0);
    }
}
