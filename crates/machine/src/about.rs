//! What a machine is made of, for those who ask.

use std::path::PathBuf;

use serde::Serialize;

use crate::config::{Endpoint, Plan};

/// What a machine is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct About {
    /// Its name.
    pub name: String,
    /// vCPUs.
    pub cpus: usize,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Processor model, as it was asked for.
    pub cpu: String,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<PathBuf>,
    /// The device whose terminal `wardian console` shows: serial, console or none.
    pub terminal: &'static str,
}

impl About {
    pub(crate) fn of(plan: &Plan) -> About {
        let terminal = match (&plan.serial, &plan.console) {
            (Endpoint::Stdio, _) => "serial",
            (_, Endpoint::Stdio) => "console",
            _ => "none",
        };
        About {
            name: plan.name.clone(),
            cpus: plan.cpus,
            memory: plan.memory,
            cpu: plan.cpu.clone(),
            kernel: plan.kernel.clone(),
            initrd: plan.initrd.clone(),
            cmdline: plan.cmdline.clone(),
            disks: plan.disks.iter().map(|disk| disk.path.clone()).collect(),
            terminal,
        }
    }
}
