//! What the broker says about connections (<https://docs.aws.amazon.com/iot/latest/developerguide/life-cycle-events.html>).

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Connected or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PresenceKind {
    /// A connection was opened.
    Connected,
    /// It is gone, whatever the reason.
    Disconnected,
}

/// A lifecycle event, as the broker publishes it on `$aws/events/presence/{kind}/{clientId}`.
/// It may come twice and out of order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PresenceEvent {
    /// MQTT client id: the thing's name, for devices.
    pub client_id: String,
    /// When, in Unix milliseconds.
    pub timestamp: i64,
    /// Which of the two.
    pub event_type: PresenceKind,
    /// The connection that the event belongs to.
    pub session_identifier: String,
    /// Orders the connections of a client; begins again at 0 after about an hour without one.
    pub version_number: i64,
}

/// The last that is known of a thing's connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Presence {
    /// Whether the last known connection is open.
    pub connected: bool,
    /// Its id.
    pub session_identifier: String,
    /// Its number.
    pub version_number: i64,
    /// When the broker said so, in Unix milliseconds.
    pub timestamp: i64,
}

/// A lower `versionNumber` is a new beginning only after a long silence: the broker forgets the old number
/// about an hour after the last connection, so half of that tells a restart from a message that came late. For the same reason a
/// higher one that is so much older is from before the new beginning.
const RESTART_AFTER_MS: i64 = 30 * 60 * 1000;

impl PresenceEvent {
    /// Reads an event; none if it tells neither of a connection that has opened nor of one that is gone. Such are refused
    /// connections (`connect_failed`, whose events have no `versionNumber`), and whatever AWS may add.
    pub fn read(event: Value) -> serde_json::Result<Option<Self>> {
        let kind = event.get("eventType").filter(|kind| kind.is_string());
        if kind.is_some_and(|kind| PresenceKind::deserialize(kind).is_err()) {
            return Ok(None);
        }
        serde_json::from_value(event).map(Some)
    }

    /// Whether this event tells something newer than what is known.
    pub fn supersedes(&self, known: &Presence) -> bool {
        match self.version_number.cmp(&known.version_number) {
            std::cmp::Ordering::Greater => known.timestamp.saturating_sub(self.timestamp) < RESTART_AFTER_MS,
            // One connection opens once and closes once. (A persistent session keeps its identifier over connections.)
            std::cmp::Ordering::Equal if self.session_identifier == known.session_identifier => {
                self.event_type == PresenceKind::Disconnected && known.connected
            }
            std::cmp::Ordering::Equal => self.timestamp > known.timestamp,
            std::cmp::Ordering::Less => self.timestamp.saturating_sub(known.timestamp) >= RESTART_AFTER_MS,
        }
    }

    /// Whether this event is the one that is known last.
    pub fn is(&self, known: &Presence) -> bool {
        let presence = self.presence();
        presence.connected == known.connected
            && presence.session_identifier == known.session_identifier
            && presence.version_number == known.version_number
    }

    /// What is known once the event has been taken in.
    pub fn presence(&self) -> Presence {
        Presence {
            connected: self.event_type == PresenceKind::Connected,
            session_identifier: self.session_identifier.clone(),
            version_number: self.version_number,
            timestamp: self.timestamp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: PresenceKind, session: &str, version: i64, timestamp: i64) -> PresenceEvent {
        PresenceEvent {
            client_id: "gateway-1".into(),
            timestamp,
            event_type: kind,
            session_identifier: session.into(),
            version_number: version,
        }
    }

    #[test]
    fn what_tells_of_no_connection_is_no_event_and_no_error() {
        let refused = serde_json::json!({
            "clientId": "gateway-7", "timestamp": 1_796_028_400_000_i64, "eventType": "connect_failed",
            "connectFailureReason": "AUTHORIZATION_FAILED", "principalIdentifier": "0123456789abcdef",
            "sessionIdentifier": "00000000-0000-0000-0000-000000000000", "ipAddress": "192.0.2.1",
        });
        assert_eq!(PresenceEvent::read(refused).unwrap(), None);
        assert_eq!(PresenceEvent::read(serde_json::json!({"eventType": "of the future"})).unwrap(), None);
        let console = serde_json::json!({
            "clientId": "iotconsole-4b0d04fe-a776-472a-9121-000000000000", "timestamp": 1, "eventType": "connected",
            "sessionIdentifier": "s", "principalIdentifier": "AROAXXXXXXXXXXXXXXXXX:someone", "ipAddress": "192.0.2.1",
            "versionNumber": 0,
        });
        assert_eq!(PresenceEvent::read(console).unwrap().unwrap().event_type, PresenceKind::Connected);
        for broken in [serde_json::json!({"eventType": "connected"}), serde_json::json!({"eventType": 7}), 7.into()] {
            assert!(PresenceEvent::read(broken.clone()).is_err(), "{broken}");
        }
    }

    #[test]
    fn the_presence_matrix() {
        use PresenceKind::{Connected, Disconnected};
        let connected = event(Connected, "b", 5, 1000).presence();
        let gone = event(Disconnected, "b", 5, 2000).presence();
        let cases = [
            ("the connection closes", event(Disconnected, "b", 5, 2000), &connected, true),
            ("the same connect again", event(Connected, "b", 5, 1000), &connected, false),
            ("its connect after its disconnect", event(Connected, "b", 5, 1000), &gone, false),
            ("the same disconnect again", event(Disconnected, "b", 5, 2000), &gone, false),
            ("a newer connection", event(Connected, "c", 6, 3000), &gone, true),
            ("a newer connection of the same session", event(Connected, "b", 6, 3000), &gone, true),
            ("a disconnect whose connect was not told yet", event(Disconnected, "b", 6, 3000), &connected, true),
            ("the old one's disconnect after the new connect", event(Disconnected, "a", 4, 3000), &connected, false),
            ("an old connect", event(Connected, "a", 4, 900), &connected, false),
            ("another session of the same number", event(Connected, "c", 5, 1500), &connected, true),
            ("the number is 0 again after an hour", event(Connected, "c", 0, 3_600_000 + 2000), &gone, true),
            ("what came before, told late", event(Disconnected, "a", 6, 1000 - 3_600_000), &connected, false),
            ("a low number shortly after", event(Connected, "c", 0, 60_000), &gone, false),
        ];
        for (case, event, known, expected) in cases {
            assert_eq!(event.supersedes(known), expected, "{case}");
        }
    }
}
