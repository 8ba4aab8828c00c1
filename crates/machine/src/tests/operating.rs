//! What an operator does to a machine that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use wardian_cpu::Vcpu;
use wardian_time::ResumePolicy;

use super::{POWER_PORT, Scripted, Step, out, parts, until};
use crate::control::{Control, Status};
use crate::ending::Ending;
use crate::error::Outcome;
use crate::lifecycle::{Begin, Runner};
use crate::tree::Tree;

/// A machine on a thread of its own, each life with a vCPU that computes and one that sleeps.
fn machine(begin: Begin) -> (Control, JoinHandle<Outcome>) {
    let ending = Ending::new();
    let of_assemble = Arc::clone(&ending);
    let assemble = move |held| {
        let asleep = Step::HaltUnless(Arc::new(AtomicBool::new(false)));
        let vcpus = vec![Scripted::new(vec![Step::Compute]), Scripted::new(vec![asleep])];
        Ok(parts(&Arc::default(), &of_assemble, vcpus, held))
    };
    let mut runner = Runner::new(Box::new(assemble), begin, false, ending).unwrap();
    let control = runner.control();
    (control, std::thread::spawn(move || runner.run()))
}

fn runs(control: &Control) {
    until("it runs", || control.status() == Status::Running);
}

#[test]
fn users_park_it_once_and_a_reset_leaves_it_parked() {
    let (control, thread) = machine(Begin::default());
    runs(&control);
    assert!(control.park());
    assert!(!control.park(), "it is parked already");
    assert_eq!(control.status(), Status::Paused);
    let clock = control.stats().guest_ns;
    assert!(clock > 0);
    assert_eq!(control.stats().guest_ns, clock, "time stands still");
    control.reset();
    until("the next life", || control.stats().reboots == 1 && control.status() == Status::Paused);
    assert!(control.with_vcpu(0, &mut |_| {}), "it has not run");
    assert_eq!(control.stats().guest_ns, 0);
    assert!(control.unpark(Some(ResumePolicy::Freeze)));
    assert!(!control.unpark(None), "it is not parked");
    runs(&control);
    until("time runs", || control.stats().guest_ns > 0);
    assert!(control.press_power_button(), "it powers off, as toys do");
    assert!(matches!(thread.join().unwrap(), Outcome::PowerOff));
    assert_eq!(control.status(), Status::Ended);
    assert!(!control.press_power_button() && !control.nmi(0));
    assert_eq!(control.inspect(), None);
    assert!(control.park() && control.status() == Status::Ended);
}

#[test]
fn it_begins_paused_if_so_asked() {
    let (control, thread) = machine(Begin { paused: true, ..Begin::default() });
    until("it is paused", || control.status() == Status::Paused);
    assert_eq!(control.stats().guest_ns, 0);
    assert!(control.unpark(None));
    runs(&control);
    control.end();
    assert!(matches!(thread.join().unwrap(), Outcome::Outside));
}

#[test]
fn a_vcpu_is_shown_whatever_it_does() {
    let (control, thread) = machine(Begin::default());
    runs(&control);
    let rax = |vcpu: &mut dyn Vcpu| vcpu.state().gpr[0];
    for round in 0..200 {
        // One that computes, one that sleeps; every fourth time, both at the gate.
        let paused = (round % 4 == 0).then(|| control.pause());
        assert_eq!((control.look(0, rax), control.look(1, rax)), (Some(0x1234), Some(0x1234)));
        drop(paused);
    }
    assert_eq!(control.look(2, rax), None);
    let rested = || control.time_spent()[0].resting_ns;
    // After the last pause it may be at the gate yet.
    let computed = control.time_spent()[0].guest_ns;
    until("it computes again", || control.time_spent()[0].guest_ns > computed);
    let before = rested();
    assert!((0..20).all(|_| control.look(0, rax).is_some()));
    assert_eq!(rested(), before, "a look is no pause");
    assert!(control.nmi(1) && !control.nmi(2));
    let tree = control.inspect().unwrap();
    assert_eq!(tree.get("vcpus/0/registers/rax"), Some(&Tree::from("0x1234")));
    assert_eq!(tree.get("vcpus/1/phase"), Some(&Tree::from("halted")));
    assert_eq!(tree.get("status"), Some(&Tree::from("running")));
    assert_eq!(tree.get("memory/size"), Some(&Tree::Number(0x10000)));
    assert!(tree.get("devices/toy").is_some());
    control.end();
    thread.join().unwrap();
    assert_eq!(control.look(0, rax), None);
}

#[test]
fn many_look_at_once_while_it_is_paused_and_goes_on() {
    let (control, thread) = machine(Begin::default());
    runs(&control);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lookers: Vec<_> = (0..3)
            .map(|n| {
                let control = &control;
                scope.spawn(move || (0..200).all(|_| control.look(n % 2, |vcpu| vcpu.state().rip).is_some()))
            })
            .collect();
        let pauser = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                control.park();
                control.unpark(None);
            }
        });
        let all = lookers.into_iter().all(|looker| looker.join().unwrap());
        done.store(true, Ordering::Release);
        pauser.join().unwrap();
        assert!(all, "each look is answered");
    });
    control.end();
    thread.join().unwrap();
}

#[test]
fn counters_of_lives_add_up_at_any_moment() {
    let ending = Ending::new();
    let of_assemble = Arc::clone(&ending);
    let mut lives = 0;
    let assemble = move |held| {
        lives += 1;
        // Reset twice, then power off.
        let vcpu = Scripted::new(vec![out(POWER_PORT, u32::from(lives < 3))]);
        Ok(parts(&Arc::default(), &of_assemble, vec![vcpu], held))
    };
    let mut runner = Runner::new(Box::new(assemble), Begin::default(), false, ending).unwrap();
    let control = runner.control();
    let thread = std::thread::spawn(move || runner.run());
    let mut last = 0;
    while control.status() != Status::Ended {
        let count =
            control.stats().vcpus[0].exits.iter().find(|exit| exit.kind == "port-out").map_or(0, |e| e.count);
        assert!(count >= last && count <= 3, "{last}, then {count}");
        last = count;
    }
    thread.join().unwrap();
    assert_eq!((control.stats().reboots, control.stats().vcpus[0].exits[0].count), (2, 3));
}
