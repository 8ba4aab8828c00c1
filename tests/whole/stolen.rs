//! Stolen time: what the host did not give a vCPU that wanted to run is what the guest's kernel shows.

use rustix::thread::{CpuSet, sched_setaffinity};
use wardian_tests::{Debian, Kernel, well_ended};

use crate::or_skip;

#[test]
fn steal_is_what_the_host_did_not_give() {
    // Two vCPUs that compute share one processor: the machine inherits this thread's affinity.
    let mut one = CpuSet::new();
    one.set(rustix::thread::sched_getcpu());
    sched_setaffinity(None, &one).expect("this thread may choose its processors");
    let script = "for c in 0 1; do taskset -c $c timeout 5 sh -c 'while :; do :; done' & done\n\
                  wait\n\
                  awk '/^cpu / { print \"stolen=\" $9 }' /proc/stat\n";
    let folder = tempfile::tempdir().expect("a folder");
    let stats = folder.path().join("stats");
    let guest = or_skip!(Debian::script(Kernel::Cloud, script)).args(&["--cpus", "2", "--memory", "256M"]);
    let ended = guest.build().args(["--stats-json".as_ref(), stats.as_os_str()]).run();
    well_ended(&ended);
    let text = std::fs::read_to_string(&stats).expect("counters");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let times = stats["vcpus"].as_array().expect("vCPUs").iter().map(|vcpu| &vcpu["time"]);
    let delayed: f64 = times.clone().filter_map(|time| time["delayed_ns"].as_f64()).sum::<f64>() / 1e9;
    let ran: f64 = times.filter_map(|time| time["ran_ns"].as_f64()).sum::<f64>() / 1e9;
    // In hundredths of a second.
    let stolen = ended.value("stolen").parse::<f64>().expect("a number") / 100.0;
    assert!(
        delayed > 3.0 && ran > 1.0,
        "the vCPUs were in each other's way: {ran} s run, {delayed} s waited"
    );
    // The guest counts from when its kernel has turned the clock on, and has not seen the last moment.
    let missed = delayed - stolen;
    assert!((-0.1..0.6 + delayed / 10.0).contains(&missed), "{stolen} s stolen of {delayed} s waited");
}
