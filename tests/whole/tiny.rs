//! The bare-metal guests of `guests/`: each tests the machine from inside, by itself, and must find no fault.

use wardian_tests::{Run, tiny};

fn run(name: &str, more: &str) -> wardian_tests::Ended {
    let kernel = tiny(name);
    let command_line = format!("cpus=2 {more}");
    let run = Run::default().limit(120).args(["--cpus", "2", "--memory", "256M", "--debug-exit"]);
    run.args(["--serial", "stdio", "--cmdline", &command_line])
        .args(["--kernel".as_ref(), kernel.as_os_str()])
        .run()
}

macro_rules! guest {
    ($name:ident) => {
        #[test]
        fn $name() {
            let ended = run(stringify!($name), "");
            let failed: Vec<&str> = ended.serial.lines().filter(|line| line.contains("FAIL")).collect();
            assert!(failed.is_empty(), "{failed:#?}");
            assert!(!ended.serial.is_empty(), "the guest says something");
            assert_eq!(ended.code(), Some(1), "status 0 by the debug port");
        }
    };
}

include!(concat!(env!("OUT_DIR"), "/guests.rs"));

#[test]
fn multiboot_guest_ends_with_its_status() {
    for (code, status) in [(0, 1), (3, 7), (127, 255)] {
        let ended = run("hello", &format!("exit={code}"));
        assert!(ended.serial.contains(&format!("exit={code}\n")), "the command line arrives");
        assert_eq!(ended.code(), Some(status));
    }
}

#[test]
fn the_doorbell_tells_what_a_clock_of_ticks_shows() {
    let folder = tempfile::tempdir().unwrap();
    let rings = folder.path().join("rings.csv");
    let kernel = tiny("tick");
    let ended = Run::default()
        .limit(60)
        .args(["--memory", "64M", "--debug-exit", "--serial", "none", "--timer-policy", "replay"])
        .args(["--cmdline", "device=hpet mode=count hz=1000 seconds=2"])
        .args(["--kernel".as_ref(), kernel.as_os_str(), "--doorbell".as_ref(), rings.as_os_str()])
        .run();
    assert_eq!(ended.code(), Some(1));
    let text = std::fs::read_to_string(&rings).unwrap();
    let rows: Vec<Vec<i64>> = text
        .lines()
        .skip(1)
        .map(|line| line.split(',').map(|word| word.parse().unwrap()).collect())
        .collect();
    // The first, one after a second, some in the last second, two at the end.
    assert!(rows.len() >= 6, "{text}");
    // raw, guest, sequence, ticks, passes, lost, length of the ring, clock.
    let first = rows.iter().rfind(|row| row[7] == 0).unwrap();
    for (row, next) in rows.iter().zip(&rows[1..]) {
        assert!(row.len() == 8 && row[0] < next[0] && row[1] < next[1] && row[2] + 1 == next[2], "{text}");
    }
    for row in rows.iter().filter(|row| row[7] > 0) {
        assert_eq!(row[7], row[3] * 1_000_000, "a tick is a millisecond: {text}");
        // Late on a busy host, but no tick is made up.
        assert!(row[7] <= row[0] - first[0] + 1_000_000, "{text}");
    }
    let last = rows.last().unwrap();
    assert!(last[7] > 1_000_000_000, "replayed, so it is not far behind: {text}");
}
