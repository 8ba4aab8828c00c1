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
