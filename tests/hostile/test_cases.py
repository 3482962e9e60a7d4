"""Which test holds what: each case of malice and pressure, and each of the kernel's hard cases.

The tests that need an attacker are here; where a test elsewhere asks the same, it is named.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

LIMIT = "broker/test_pressure.py"  # a broker at its own, without attackers
SLOW = "hostile/test_slow_closes.py"
TURNS = "hostile/test_long_turns.py"

CASES = {
    # --- pressure ---
    "no descriptor left (EMFILE)": [
        "hostile/test_pressure.py::test_no_descriptor_left",
        "hostile/test_pressure.py::test_sixty_clients_and_few_descriptors",
        "broker/test_pressure.py::test_a_put_at_the_limit_is_refused_and_leaks_nothing",
        "broker/test_pressure.py::test_a_read_only_loan_at_the_limit_is_refused_and_leaks_nothing",
    ],
    "no file left in the system (ENFILE)": [
        "hostile/test_pressure.py::test_no_file_left_in_the_system"
    ],
    "too many in flight (ETOOMANYREFS)": [
        "hostile/test_pressure.py::test_too_many_in_flight_for_an_unprivileged_broker",
        "hostile/test_pressure.py::test_who_receives_nothing_is_the_only_one_refused",
    ],
    "clients that never read": ["hostile/test_pressure.py::test_who_never_reads"],
    "clients that never write, that say nothing": [
        "hostile/test_pressure.py::test_who_says_nothing"
    ],
    "clients that are stopped": ["hostile/test_pressure.py::test_who_is_stopped"],
    "half a hello": ["hostile/test_wrong_messages.py::test_a_half_hello"],
    "slow closes: SO_LINGER": [
        "hostile/test_slow_closes.py::test_lingering_sockets",
        f"{SLOW}::test_more_lingering_sockets_in_a_message_than_the_broker_has_room_for",
    ],
    "slow closes: FUSE": [
        "hostile/test_slow_closes.py::test_a_file_system_that_hangs_in_flush",
        "hostile/test_slow_closes.py::test_a_file_system_that_hangs_while_it_is_looked_at",
        "hostile/test_slow_closes.py::test_who_dies_while_what_it_put_is_looked_at",
        "hostile/test_slow_closes.py::test_what_was_never_received_and_hangs_in_flush",
        "hostile/test_slow_closes.py::test_what_hangs_is_within_the_share_of_who_sent_it",
    ],
    "offenders that fill the queue": ["hostile/test_pressure.py::test_a_queue_full_of_offenders"],
    "requests that take long, and many of them": [
        f"{TURNS}::test_session_that_many_epolls_watch_lets_others_be_served",
        f"{TURNS}::test_requests_for_thousands_of_names_let_others_be_served",
        f"{TURNS}::test_newcomers_with_very_many_groups_let_others_be_served",
        f"{TURNS}::test_newcomers_with_very_many_groups_that_send_junk_let_others_be_served",
        f"{TURNS}::test_flood_of_short_requests_lets_others_be_served_and_each_session_of_it",
        f"{TURNS}::test_hundreds_of_sessions_that_always_have_a_message_let_others_be_served",
        f"{TURNS}::test_clients_that_come_and_go_all_the_time_lock_nobody_out",
        f"{TURNS}::test_sessions_that_are_shut_down_again_and_again_let_others_be_served",
        f"{TURNS}::test_many_at_once_let_others_be_served",
        "ipc/test_turns_of_users.py::test_user_with_one_request_waits_for_two_of_a_user_with_many",
    ],
    # --- malice ---
    "unasked descriptors": [
        "hostile/test_unasked.py::test_to_a_session_that_puts",
        "hostile/test_unasked.py::test_to_a_session_that_puts_nothing",
        "hostile/test_unasked.py::test_what_comes_while_the_broker_is_stopped",
    ],
    "253 at a time": [
        "hostile/test_unasked.py::test_a_put_of_another_number_than_one",
        "hostile/test_unasked.py::test_spam",
    ],
    "sockets sent over themselves": ["hostile/test_unasked.py::test_a_socket_sent_over_itself"],
    "the client's own connection sent back": [
        "hostile/test_unasked.py::test_its_own_connection_sent_back",
        "hostile/test_unasked.py::test_its_own_connection_left_in_the_queue",
    ],
    "descriptors before hello": ["hostile/test_unasked.py::test_before_hello_and_with_it"],
    "truncated messages": ["hostile/test_wrong_messages.py::test_truncated_messages"],
    "oversized messages": [
        "hostile/test_wrong_messages.py::test_oversized_messages",
        "hostile/test_wrong_messages.py::test_messages_with_something_behind_them",
    ],
    "every field wrong in every way": [
        "hostile/test_wrong_messages.py::test_every_field_of_every_verb_wrong_in_every_way",
        "hostile/test_wrong_messages.py::test_other_versions",
        "hostile/test_wrong_messages.py::test_any_bytes",
    ],
    "seq replayed": ["hostile/test_wrong_messages.py::test_a_seq_that_was_there_before"],
    "seq skipped, wrapped": ["hostile/test_wrong_messages.py::test_a_seq_that_is_none"],
    "msgpack bombs": ["hostile/test_wrong_messages.py::test_bombs"],
    "names with line ends and escapes": [
        "hostile/test_names_and_tickets.py::test_names_with_line_ends_and_escapes",
        "hostile/test_names_and_tickets.py::test_refusals_are_one_line_each",
        "hostile/test_names_and_tickets.py::test_what_a_list_shows_of_others_is_on_one_line",
    ],
    "foreign loan ids": [
        "hostile/test_wrong_messages.py::test_out_of_turn",
        "hostile/test_wrong_messages.py::test_cancel_of_nothing",
        "hostile/test_names_and_tickets.py::test_the_loan_of_another_is_left_alone",
    ],
    "other people's tickets": [
        "hostile/test_names_and_tickets.py::test_other_peoples_tickets",
        "hostile/test_names_and_tickets.py::test_a_name_as_bytes_is_a_ticket",
    ],
    "who is not admitted": [
        "hostile/test_names_and_tickets.py::test_who_is_not_admitted_gets_no_session"
    ],
    "a peer in a user namespace": [
        "hostile/test_identity.py::test_root_of_a_user_namespace_is_who_made_it",
        "ipc/test_rules.py::test_a_uid_that_the_brokers_namespace_does_not_map_is_nobody",
    ],
    "a peer in a sibling PID namespace": [
        "hostile/test_identity.py::test_a_peer_in_a_sibling_pid_namespace"
    ],
    "a client that changes its uid": [
        "hostile/test_identity.py::test_who_changes_its_uid_after_connecting",
        "hostile/test_identity.py::test_a_socket_that_somebody_else_has_connected",
    ],
    # --- the kernel's hard cases, in the order of the design's table; those above apart ---
    "control buffer too small": [
        "hostile/test_kernel.py::test_a_control_buffer_that_is_too_small",
        "ipc/test_fake_broker.py::test_more_descriptors_than_promised",
    ],
    "EMFILE while receiving": [
        "broker/test_pressure.py::test_a_put_at_the_limit_is_refused_and_leaks_nothing",
        f"{LIMIT}::test_a_borrower_at_its_own_limit_is_told_so_and_nothing_stays_on_loan",
        "ipc/test_limits.py::test_no_room_for_the_next_one",
    ],
    "recv, read on the socket": [
        "hostile/test_kernel.py::test_a_plain_receive_discards_descriptors"
    ],
    "MSG_PEEK": ["hostile/test_kernel.py::test_nothing_is_peeked_at"],
    "SEQPACKET, empty packet": [
        "hostile/test_kernel.py::test_an_empty_packet_looks_like_the_end",
        "ipc/test_wire.py::test_empty_packet_with_a_descriptor_is_the_end",
    ],
    "254 descriptors": ["ipc/test_limits.py::test_300_names_come_in_two_messages"],
    "stopped client": [
        "hostile/test_pressure.py::test_who_is_stopped",
        "ipc/test_wire.py::test_who_never_reads_is_ended",
    ],
    "EMFILE in accept": [
        "hostile/test_pressure.py::test_no_descriptor_left",
        f"{LIMIT}::test_a_full_table_does_not_spin_and_the_queue_is_served_when_others_leave",
    ],
    "client with SO_LINGER socket": [
        "broker/test_close.py::test_the_final_close_holds_up_nobody",
        "broker/test_close.py::test_what_was_sent_unasked_holds_up_nobody",
    ],
    "SIOCOUTQ": [
        "ipc/test_wire.py::test_the_second_descriptor_waits_until_the_first_is_read",
        "ipc/test_wire.py::test_no_wake_up_is_lost_between_two_descriptors",
    ],
    "SO_PEERCRED": ["hostile/test_identity.py::test_who_changes_its_uid_after_connecting"],
    "fork after connect": [
        "ipc/test_forks.py::test_parent_first",
        "ipc/test_forks.py::test_an_exclusive_loan_stays_with_the_parent",
    ],
    "subprocess, pass_fds, posix_spawn": [
        "ipc/test_loan.py::test_pass_fds_lasts_until_both_are_done"
    ],
    "borrower's read, settimeout": [
        "ipc/test_read_only.py::test_a_plain_loan_shares_the_offset",
        "hostile/test_kernel.py::test_a_borrowers_settimeout_is_the_owners",
    ],
    "borrower's shutdown on a listener": [
        "hostile/test_kernel.py::test_a_borrowers_shutdown_of_a_listener_is_everybodys"
    ],
    "flock, OFD locks": ["hostile/test_kernel.py::test_flock_follows_the_description"],
    "POSIX locks": [
        "hostile/test_kernel.py::test_posix_locks_are_dropped_by_any_close_of_the_process"
    ],
    "reopen through /proc/self/fd": [
        "test_descriptors.py::test_reopening_is_by_the_rights_of_this_process",
        "ipc/test_read_only.py::test_what_cannot_be_opened_anew",
    ],
    "read-only loan of a memfd": [
        "hostile/test_kernel.py::test_a_read_only_loan_of_a_memfd_can_be_opened_for_writing"
    ],
    "directory descriptor": ["ipc/test_bad_input.py::test_kinds_that_are_refused"],
    "close in another thread": [
        "broker/test_retire.py::test_the_close_waits_for",
        "broker/test_retire.py::test_a_wait_that_times_out_leaves_it_retired",
    ],
    "PDEATHSIG, pipes to the owner": [
        "broker/test_life.py::test_a_killed_owner_without_loans_ends_it_at_once",
        "broker/test_life.py::test_a_loan_of_the_owner_lives_on_in_its_forked_worker",
    ],
    # Windows: there is none yet
}


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("case", CASES)
def test_the_test_of_each_case_is_there(case: str) -> None:
    assert CASES[case]
    for named in CASES[case]:
        file, _, test = named.partition("::")
        assert test in names_in(TESTS / file), named


def test_each_test_here_is_of_a_case() -> None:
    named = {one for tests in CASES.values() for one in tests}
    here = {
        f"hostile/{path.name}::{test}"
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name != Path(__file__).name
        for test in names_in(path)
    }
    assert here <= named, here - named
