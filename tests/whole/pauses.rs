//! A machine that is paused, and one whose whole process is stopped: what its clocks show afterwards, and that
//! its watchdogs keep quiet although they are set to bark after two seconds.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use wardian_tests::{Debian, Ended, Kernel, well_ended};

use crate::or_skip;

const CLOCKS: &str = include_str!("clocks.c");
const MS: i64 = 1_000_000;
/// How long the machine rests.
const REST: Duration = Duration::from_secs(4);

/// One ring of the doorbell: the host's raw clock, and the guest's wall clock.
struct Ring {
    raw: i64,
    wall: i64,
}

fn rings(file: &Path) -> Vec<Ring> {
    let text = std::fs::read_to_string(file).expect("a doorbell");
    let ring = |line: &str| {
        let mut fields = line.split(',').map(str::parse::<i64>);
        let raw = fields.next()?.ok()?;
        Some(Ring { raw, wall: fields.nth(2)?.ok()? })
    };
    text.lines().filter_map(ring).collect()
}

/// What became of the clocks over the rest, and what happened by the machine's events.
struct Rested {
    /// How far the guest's wall clock fell behind the host's, in nanoseconds.
    lost: i64,
    events: Vec<serde_json::Value>,
}

impl Rested {
    fn event(&self, name: &str) -> &serde_json::Value {
        let found: Vec<_> = self.events.iter().filter(|event| event["event"] == name).collect();
        assert_eq!(found.len(), 1, "one event {name} among {:?}", self.events);
        found[0]
    }

    fn causes(&self) -> Vec<&str> {
        self.events.iter().filter_map(|event| event["verdict"]["cause"].as_str()).collect()
    }
}

/// Lets both vCPUs read clocks, sends the two signals with a rest between, and looks what became of the clocks.
fn rest(policy: &str, signals: [Signal; 2]) -> Result<Rested, String> {
    // Time that is frozen is none of the guest's.
    let frozen = policy == "freeze" && signals[0] != Signal::STOP;
    let script = format!(
        "cat > /tmp/clocks.c <<'END'\n{CLOCKS}\nEND\n\
         gcc -O2 -pthread -o /tmp/clocks /tmp/clocks.c || exit 1\n\
         echo 1 > /proc/sys/kernel/watchdog_thresh\n\
         echo 3 > /sys/module/rcupdate/parameters/rcu_cpu_stall_timeout\n\
         /tmp/clocks {}\n",
        if frozen { 4 } else { 8 }
    );
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (bell, events) = (folder.path().join("bell"), folder.path().join("events"));
    let guest = Debian::script(Kernel::Cloud, &script)?;
    let more = ["--doorbell".as_ref(), bell.as_os_str(), "--events".as_ref(), events.as_os_str()];
    let run =
        guest.args(&["--cpus", "2", "--memory", "512M", "--on-resume", policy, "--lockup-seconds", "3"]);
    let mut running = run.build().args(more).start();
    running.wait_for("clocks run");
    std::thread::sleep(Duration::from_millis(1500));
    let pid = i32::try_from(running.id()).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, signals[0]).expect("a signal");
    std::thread::sleep(REST);
    kill_process(pid, signals[1]).expect("a signal");
    let ended: Ended = running.end();
    assert_eq!(ended.value("backwards"), "0", "of {} readings", ended.value("readings"));
    let rings = rings(&bell);
    let gap = |at: &usize| rings[*at].raw - rings[at - 1].raw;
    let first = (1..rings.len()).max_by_key(gap).expect("rings");
    // A busy host heeds one signal later than the other.
    assert!(gap(&first) >= REST.as_nanos() as i64 / 2, "{} ns", gap(&first));
    // Between a reading and its ring the host may run something else: the quickest of some count.
    let behind = |rings: &[Ring]| rings.iter().map(|ring| ring.raw - ring.wall).min().expect("rings");
    let (before, after) = rings.split_at(first);
    let (before, after) = (&before[before.len().saturating_sub(100)..], &after[..after.len().min(100)]);
    let lost = behind(after) - behind(before);
    let text = std::fs::read_to_string(&events).map_err(|e| e.to_string())?;
    let events = text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    well_ended(&ended);
    Ok(Rested { lost, events })
}

#[test]
fn a_pause_that_advances_keeps_the_hosts_time() {
    let rested = or_skip!(rest("advance", [Signal::USR1, Signal::USR2]));
    assert!(rested.lost.abs() < MS, "{} ns", rested.lost);
    let moved = rested.event("resumed")["guest_moved_ns"].as_i64().expect("a number");
    let paused = rested.event("resumed")["paused_ns"].as_i64().expect("a number");
    assert!((moved - paused).abs() < MS, "moved by {moved} ns for {paused} ns");
    assert!(rested.causes().iter().all(|cause| ["paused", "steal"].contains(cause)), "{:?}", rested.events);
}

#[test]
fn a_pause_that_freezes_is_lost_exactly() {
    let rested = or_skip!(rest("freeze", [Signal::USR1, Signal::USR2]));
    let paused = rested.event("resumed")["paused_ns"].as_i64().expect("a number");
    assert!((rested.lost - paused).abs() < MS, "lost {} ns of a pause of {paused} ns", rested.lost);
    assert_eq!(rested.event("resumed")["guest_moved_ns"], 0);
}

#[test]
fn a_stopped_process_keeps_the_hosts_time_and_its_guest_is_told() {
    let rested = or_skip!(rest("freeze", [Signal::STOP, Signal::CONT]));
    assert!(rested.lost.abs() < MS, "{} ns", rested.lost);
    let stopped = rested.event("stopped")["stopped_ns"].as_i64().expect("a number");
    assert!(stopped >= REST.as_nanos() as i64 / 2, "{stopped}");
    assert!(rested.causes().iter().all(|cause| ["stopped", "steal"].contains(cause)), "{:?}", rested.events);
}
