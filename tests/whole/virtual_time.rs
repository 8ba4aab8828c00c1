//! Virtual time: what a guest does is a function of the guest alone.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use wardian_tests::{Debian, Kernel, Run, tiny};

use crate::or_skip;

/// Runs the clock of timer interrupts for a second of its own time; what was taken when, and what it said.
fn run(folder: &Path, line: &str) -> (String, String) {
    let kernel = tiny("tick");
    let trace = folder.join("interrupts");
    let line = format!("{line} seconds=1");
    let run = Run::default().limit(120).args(["--time", "virtual", "--memory", "64M", "--debug-exit"]);
    let ended = run
        .args(["--serial", "none", "--cmdline", &line, "--kernel"])
        .args([kernel.as_os_str(), "--trace-interrupts".as_ref(), trace.as_os_str()])
        .run();
    assert_eq!(ended.code(), Some(1), "{line}: {}", ended.serial);
    (std::fs::read_to_string(&trace).expect("a trace"), ended.serial.clone())
}

/// Calls `f` for each of `runs`; during every other one the host has something else to do as well.
fn disturbed(runs: usize, mut f: impl FnMut(usize)) {
    for n in 0..runs {
        let over = AtomicBool::new(n % 2 == 0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            f(n);
            over.store(true, Relaxed);
        });
    }
}

fn same(line: &str, runs: usize, ticks: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = None;
    disturbed(runs, |n| {
        let seen = run(folder.path(), line);
        // A head line, and at the edges of the second one tick more or less.
        let taken = seen.0.lines().count();
        assert!((ticks..ticks + 5).contains(&taken), "{line}: {taken} lines");
        let want = first.get_or_insert_with(|| seen.clone());
        if let Some((a, b)) = seen.0.lines().zip(want.0.lines()).find(|(a, b)| a != b) {
            panic!("{line}: run {n} differs: {a}, not {b}");
        }
        assert_eq!(seen, *want, "{line}: run {n}");
    });
}

#[test]
fn a_hundred_runs_take_the_same_interrupts_at_the_same_instructions() {
    same("device=lapic hz=250 mode=compensate load=job", 100, 250);
}

/// With nothing from outside, and no random numbers of the host's processor, not even the kernel's random base differs.
#[test]
fn a_stock_kernel_boots_the_same_way() {
    let kernel = or_skip!(Debian::shell(Kernel::Cloud)).kernel_image().to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let trace = folder.path().join("interrupts");
    let mut first = None;
    disturbed(3, |n| {
        let run = Run::default().args(["--time", "virtual", "--cpu", "host,-rdrand,-rdseed", "--no-reboot"]);
        let ended = run
            .args(["--cmdline", "console=ttyS0 panic=-1", "--kernel"])
            .args([kernel.as_os_str(), "--trace-interrupts".as_ref(), trace.as_os_str()])
            .run();
        // There is no root to mount: the kernel gets that far, and resets the machine.
        assert!(ended.serial.contains("Unable to mount root fs"), "{}", ended.serial);
        let seen = (std::fs::read_to_string(&trace).expect("a trace"), ended.serial.clone());
        assert!(seen.0.lines().count() > 100, "{}", seen.0);
        let want = first.get_or_insert_with(|| seen.clone());
        let lines = seen.1.lines().chain(seen.0.lines()).zip(want.1.lines().chain(want.0.lines()));
        if let Some((a, b)) = lines.into_iter().find(|(a, b)| a != b) {
            panic!("run {n} differs: {a}, not {b}");
        }
        assert_eq!(seen, *want, "run {n}");
    });
}

#[test]
fn every_timer_is_as_exact() {
    same("device=pit hz=1000 mode=count load=spin", 4, 1000);
    same("device=rtc hz=1024 mode=count load=spin", 4, 1024);
    same("device=hpet hz=100 mode=compensate load=idle", 4, 100);
    same("device=lapic hz=1000 mode=count load=idle", 4, 1000);
}
