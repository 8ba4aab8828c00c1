//! What the socket is for.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::{Value, json};
use wardian_cpu::CpuState;

use super::{Case, ECHOES, SLEEPS};
use crate::client::{Client, ClientError};

fn client(machine: &Case) -> Client {
    Client::find(&machine.directory, "box").unwrap()
}

#[test]
fn it_is_paused_and_goes_on_and_tells_so() {
    let machine = Case::new(SLEEPS, "1");
    let client = client(&machine);
    let info = client.get("/info").unwrap();
    assert_eq!(
        (&info["name"], &info["status"], &info["terminal"]),
        (&json!("box"), &json!("running"), &json!("serial"))
    );
    assert_eq!(info["pid"], std::process::id());
    let listener = Client::find(&machine.directory, "box").unwrap();
    let listener = std::thread::spawn(move || {
        let mut names = Vec::new();
        listener
            .lines("/events", |line| {
                let event: Value = serde_json::from_slice(line).unwrap();
                names.push(event["event"].as_str().unwrap().to_owned());
                true
            })
            .unwrap();
        names
    });
    assert_eq!(client.post("/pause", None).unwrap(), json!({ "status": "paused", "changed": true }));
    assert_eq!(client.post("/pause", None).unwrap(), json!({ "status": "paused", "changed": false }));
    let clock = || client.get("/stats").unwrap()["guest_ns"].as_u64().unwrap();
    let before = clock();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(clock(), before, "guest time stands still");
    let freeze = json!({ "clock": "freeze" });
    assert_eq!(
        client.post("/resume", Some(&freeze)).unwrap(),
        json!({ "status": "running", "changed": true })
    );
    client.post("/reset", None).unwrap();
    super::until("the next life", || client.get("/stats").unwrap()["reboots"] == 1);
    let waiter = Client::find(&machine.directory, "box").unwrap();
    let waiter = std::thread::spawn(move || waiter.wait(None));
    assert!(matches!(client.wait(Some(Duration::from_millis(50))), Ok(None)), "it has not ended");
    client.post("/stop", Some(&json!({ "how": "now" }))).unwrap();
    let end = waiter.join().unwrap().unwrap().unwrap();
    assert_eq!(end, json!({ "status": 12, "text": "Ended from outside" }));
    let names = listener.join().unwrap();
    assert_eq!(names, ["paused", "resumed", "reset", "ended"]);
    let gone = client.get("/info").unwrap_err();
    assert!(matches!(gone, ClientError::Connection { .. }), "{gone}");
    let gone = Client::find(&machine.directory, "box").err().unwrap();
    assert_eq!(gone.to_string(), "No machine named box runs");
    machine.end();
}

#[test]
fn another_process_can_read_memory_and_registers() {
    let machine = Case::new(SLEEPS, "2");
    let client = client(&machine);
    let memory = client.get("/memory").unwrap();
    let file = std::fs::File::open(format!("/proc/{}/fd/{}", memory["pid"], memory["fd"])).unwrap();
    let region = &memory["regions"][0];
    assert_eq!((region["gpa"].as_u64(), region["offset"].as_u64()), (Some(0), Some(0)));
    let mut code = [0; 3];
    file.read_exact_at(&mut code, 0x10_0020).unwrap();
    assert_eq!(code, SLEEPS, "the guest's code");
    assert_eq!(machine.get("/memory/1048608?size=3").body, SLEEPS);
    let all = client.get("/vcpus").unwrap();
    let state: CpuState = serde_json::from_value(all[0]["state"].clone()).unwrap();
    assert_eq!((state.rip, all[0]["phase"].as_str()), (0x10_0021, Some("halted")));
    assert!(state.xsave.len() >= 576);
    let other: CpuState = serde_json::from_value(client.get("/vcpus/1").unwrap()["state"].clone()).unwrap();
    assert_eq!(other.activity, wardian_cpu::Activity::WaitForSipi);
    assert_eq!(client.get("/inspect/vcpus/0/registers/rip").unwrap(), "0x100021");
    assert!(client.get("/inspect/devices").unwrap().as_object().unwrap().len() > 8);
    machine.end();
}

#[test]
fn several_watch_one_terminal_and_type() {
    let machine = Case::new(ECHOES, "1");
    let client = client(&machine);
    let expect = |stream: &mut std::os::unix::net::UnixStream, begun: &[u8], text: &str| {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut seen = begun.to_vec();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "{:?}", String::from_utf8_lossy(&seen));
            seen.push(byte[0]);
        }
        seen
    };
    let (mut one, begun) = client.console(100).unwrap();
    one.write_all(b"hello").unwrap();
    expect(&mut one, &begun, "hello");
    let (mut two, begun) = client.console(3).unwrap();
    assert_eq!(expect(&mut two, &begun, "llo"), b"llo", "the end of the past");
    let typed = machine.ask("POST", "/console", "", b" world");
    assert_eq!(typed.json()["typed"], 6);
    expect(&mut one, b"", " world");
    expect(&mut two, b"", " world");
    drop(one);
    // More than a FIFO holds.
    let long = "abcdefgh".repeat(200);
    two.write_all(long.as_bytes()).unwrap();
    expect(&mut two, b"", &long);
    assert!(machine.get("/console").body.ends_with(long.as_bytes()));
    machine.control.end();
    let mut rest = Vec::new();
    two.read_to_end(&mut rest).unwrap();
    machine.end();
}

#[test]
fn counters_are_in_the_format_of_prometheus() {
    let machine = Case::new(SLEEPS, "2");
    // A sleep is counted when it is over.
    drop(machine.control.pause());
    let answer = machine.get("/metrics");
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let value = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).trim().parse().unwrap()
    };
    assert!(value(r#"wardian_exits_total{machine="box",vcpu="0",kind="halt"}"#) >= 1.0);
    assert_eq!(value(r#"wardian_memory_size_bytes{machine="box"}"#), f64::from(4 << 20));
    assert!(value(r#"wardian_memory_resident_bytes{machine="box"}"#) > 1e6);
    assert!(value(r#"wardian_vcpu_steal_seconds_total{machine="box",vcpu="1"}"#) >= 0.0);
    assert!(value(r#"wardian_vcpu_phase_seconds_total{machine="box",vcpu="0",phase="halted"}"#) > 0.0);
    assert!(value(r#"wardian_guest_time_seconds{machine="box"}"#) > 0.0);
    assert_eq!(value(r#"wardian_resets_total{machine="box"}"#), 0.0);
    assert_eq!(value(r#"wardian_status{machine="box",status="running"}"#), 1.0);
    assert_eq!(value(r#"wardian_status{machine="box",status="paused"}"#), 0.0);
    // Each name has its help and type once, before its values.
    let helps = text.lines().filter(|line| line.starts_with("# HELP")).count();
    let types = text.lines().filter(|line| line.starts_with("# TYPE")).count();
    assert!(helps == types && helps >= 10, "{text}");
    machine.end();
}
