/* BASE in C: the same system calls as base.py, on both sides.
 *
 * base_twin FD: the server is forked, lends FD over a socketpair, and ends with its client.  The
 * client reads a count from stdin, does as many cycles, and answers with the count; it ends when
 * stdin does. */
#define _GNU_SOURCE /* MSG_CMSG_CLOEXEC, for a strict compiler */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SIZE = 16 };

union control {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
};

static void must(int held, const char *what)
{
    if (!held) {
        perror(what);
        exit(1);
    }
}

static void serve(int sock, int fd)
{
    char in[SIZE], reply[SIZE];
    union control control = {.header = {.cmsg_level = SOL_SOCKET,
                                        .cmsg_type = SCM_RIGHTS,
                                        .cmsg_len = CMSG_LEN(sizeof fd)}};
    struct iovec data = {reply, SIZE};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                             .msg_control = control.space, .msg_controllen = sizeof control.space};

    memset(reply, 'G', SIZE);
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    while (read(sock, in, SIZE) == SIZE) {
        must(sendmsg(sock, &message, 0) == SIZE, "sendmsg");
        must(read(sock, in, SIZE) >= 0 || errno == ECONNRESET, "read");
    }
}

static void cycle(int sock)
{
    static const char request[] = "BBBBBBBBBBBBBBBB", back[] = "RRRRRRRRRRRRRRRR";
    char in[SIZE];
    int fd;
    union control control;
    struct iovec data = {in, SIZE};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                             .msg_control = control.space, .msg_controllen = sizeof control.space};

    must(write(sock, request, SIZE) == SIZE, "write");
    must(recvmsg(sock, &message, MSG_CMSG_CLOEXEC) == SIZE, "recvmsg");
    must(message.msg_controllen >= CMSG_LEN(sizeof fd), "no descriptor came");
    memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
    must(close(fd) == 0, "close");
    must(write(sock, back, SIZE) == SIZE, "write");
}

int main(int argc, char **argv)
{
    int pair[2];
    uint32_t count;

    if (argc != 2) {
        fprintf(stderr, "usage: base_twin FD\n");
        return 2;
    }
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
    pid_t server = fork();
    must(server >= 0, "fork");
    if (server == 0) {
        close(pair[0]);
        close(STDIN_FILENO);
        close(STDOUT_FILENO);
        serve(pair[1], atoi(argv[1]));
        return 0;
    }
    close(pair[1]);
    while (read(STDIN_FILENO, &count, sizeof count) == sizeof count) {
        for (uint32_t i = 0; i < count; i++)
            cycle(pair[0]);
        must(write(STDOUT_FILENO, &count, sizeof count) == sizeof count, "stdout");
    }
    close(pair[0]);
    waitpid(server, NULL, 0);
    return 0;
}
