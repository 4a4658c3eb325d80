//! The table of devices that could not update themselves: one item a thing.

use super::device::Device;
use crate::item_table::{Item, ItemTable};

/// What is known of devices: nothing, for one that has never failed.
pub type RecoveryTable = ItemTable<Device>;

impl Item for Device {
    const KEY: &'static str = "thing";

    fn revision(&mut self) -> &mut u64 {
        &mut self.revision
    }
}
